from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels import tiles
from dsv4_kernels.attention import Entries, sparse_attention
from tests.support.tolerance import assert_close

HEADS, D, WINDOW = 3, 8, 5
WIDE = torch.float64


def by_hand(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor) -> Tensor:
    """One token and one head at a time, from the definition; the sink is in the denominator only."""
    out = torch.zeros_like(q)
    before = len(recent) - len(q)
    for token in range(len(q)):
        keys = [recent[place] for place in range(max(0, before + token - WINDOW + 1), before + token + 1)]
        if entries is not None:
            seen = range(len(entries.kv)) if entries.chosen is None else entries.chosen[token].tolist()
            keys += [entries.kv[entry].to(q.dtype) for entry in seen if 0 <= entry < entries.visible[token]]
        for head in range(HEADS):
            scores = torch.stack([q[token, head] @ key for key in keys]) / D ** .5
            total = scores.exp().sum() + sink[head].exp()
            out[token, head] = sum(score.exp() / total * key for score, key in zip(scores, keys, strict=True))
    return out


def drawn(t: int, before: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q, recent and sink."""
    shapes = ((t, HEADS, D), (before + t, D), (HEADS,))
    q, recent, sink = (torch.randn(shape, generator=random, dtype=WIDE) for shape in shapes)
    return q, recent, sink


# (queries, window keys before them): a first token, a start, a full window, one that has been left behind, long chunks
CASES = [(1, 0), (1, 4), (7, 0), (7, 2), (7, 4), (40, 4)]


@pytest.mark.parametrize(("t", "before"), CASES)
def test_window_alone(t: int, before: int, random: torch.Generator) -> None:
    q, recent, sink = drawn(t, before, random)
    assert_close(sparse_attention(q, recent, None, sink, WINDOW), by_hand(q, recent, None, sink))


@pytest.mark.parametrize("tile", [1 << 24, 1])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("t", "before"), CASES)
def test_window_and_entries(t: int, before: int, chosen: bool, tile: int, random: torch.Generator,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_VALUES", tile)
    q, recent, sink = drawn(t, before, random)
    kv = torch.randn(11, D, generator=random, dtype=WIDE)
    visible = torch.arange(t) % 12  # from none to all
    picks = torch.stack([torch.randperm(11, generator=random)[:4] for _ in range(t)])
    picks[0, 1:] = -1
    entries = Entries(kv, visible, picks if chosen else None)
    assert_close(sparse_attention(q, recent, entries, sink, WINDOW), by_hand(q, recent, entries, sink))


def test_no_entries_yet(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 0, random)
    none = Entries(torch.zeros(0, D, dtype=WIDE), torch.zeros(3, dtype=torch.int64), None)
    assert torch.equal(sparse_attention(q, recent, none, sink, WINDOW), sparse_attention(q, recent, None, sink, WINDOW))


def test_a_great_sink_swallows_everything_and_a_small_one_nothing(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 2, random)
    assert sparse_attention(q, recent, None, sink + 1000, WINDOW).abs().max() == 0
    ones = torch.ones_like(recent)
    assert_close(sparse_attention(q, ones, None, sink - 1000, WINDOW), torch.ones_like(q))


def test_a_single_query_does_not_mind_the_order_of_a_ring(random: torch.Generator) -> None:
    q, recent, sink = drawn(1, WINDOW - 1, random)
    rolled = sparse_attention(q, recent.roll(2, 0), None, sink, WINDOW)
    assert_close(rolled, sparse_attention(q, recent, None, sink, WINDOW))


def test_caches_may_be_narrower(random: torch.Generator) -> None:
    q, recent, sink = drawn(4, 2, random)
    narrow = recent.to(torch.bfloat16)
    out = sparse_attention(q, narrow, None, sink, WINDOW)
    assert out.dtype == q.dtype
    assert torch.equal(out, sparse_attention(q, narrow.double(), None, sink, WINDOW))


def test_doors_name_the_numbers(random: torch.Generator) -> None:
    q, recent, sink = drawn(4, 0, random)
    with pytest.raises(ValueError, match="4 queries have only 3 window keys"):
        sparse_attention(q, recent[1:], None, sink, WINDOW)
    with pytest.raises(ValueError, match=r"sink has shape \[2\], but \[3\]"):
        sparse_attention(q, recent, None, sink[1:], WINDOW)
