from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_kernels.compressor import Pending, compress
from tests.support.tolerance import assert_close

WIDTH = 6


class Inputs(NamedTuple):
    kv: Tensor
    scores: Tensor
    ape: Tensor


def drawn(tokens: int, ratio: int, dtype: torch.dtype = torch.float64) -> Inputs:
    random = torch.Generator().manual_seed(ratio)
    channels = WIDTH * (2 if ratio == 4 else 1)
    return Inputs(*(torch.randn(rows, channels, generator=random, dtype=torch.float64).to(dtype)
                    for rows in (tokens, tokens, ratio)))


def by_hand(x: Inputs, ratio: int) -> Tensor:
    """Every entry from its definition: candidates (token, first channel), one softmax per channel."""
    entries = []
    for group in range(len(x.kv) // ratio):
        candidates = [(token, WIDTH if ratio == 4 else 0) for token in range(group * ratio, (group + 1) * ratio)]
        if ratio == 4 and group > 0:
            candidates += [(token, 0) for token in range((group - 1) * ratio, group * ratio)]
        for channel in range(WIDTH):
            places = [(token, at + channel) for token, at in candidates]
            weight = torch.stack([(x.scores[token, at] + x.ape[token % ratio, at]).exp() for token, at in places])
            value = torch.stack([x.kv[token, at] for token, at in places])
            entries.append((weight * value).sum() / weight.sum())
    return torch.stack(entries).reshape(-1, WIDTH)


def in_pieces(x: Inputs, ratio: int, sizes: list[int]) -> Tensor:
    pending = Pending.fresh(ratio, WIDTH, x.kv.dtype)
    entries, position = [], 0
    for size in sizes:
        piece = slice(position, position + size)
        entries.append(compress(x.kv[piece], x.scores[piece], x.ape, pending, position))
        position += size
    assert position == len(x.kv)
    return torch.cat(entries)


@pytest.mark.parametrize(("ratio", "tokens"), [(4, 4), (4, 7), (4, 31), (128, 127), (128, 128), (128, 390)])
def test_entries_are_what_the_definition_says(ratio: int, tokens: int) -> None:
    x = drawn(tokens, ratio)
    entries = in_pieces(x, ratio, [tokens])
    assert entries.shape == (tokens // ratio, WIDTH)
    if len(entries):
        assert_close(entries, by_hand(x, ratio))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 127, 128, 129])
def test_any_chunks_give_the_same_entries(ratio: int, size: int) -> None:
    x = drawn(300, ratio)
    sizes = [size] * (300 // size) + [300 % size] * (300 % size > 0)
    assert_close(in_pieces(x, ratio, sizes), in_pieces(x, ratio, [300]))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 11), min_size=1, max_size=12))
def test_overlap_survives_every_cut(sizes: list[int]) -> None:
    x = drawn(sum(sizes), 4)
    assert torch.allclose(in_pieces(x, 4, sizes), in_pieces(x, 4, [sum(sizes)]), rtol=1e-12, atol=0)


def test_the_first_group_has_no_group_before_it() -> None:
    """Its candidates are its own four tokens: channels of the absent ones weigh nothing, whatever they hold."""
    x = drawn(4, 4)
    own = (x.scores + x.ape)[:, WIDTH:].softmax(0) * x.kv[:, WIDTH:]
    assert_close(in_pieces(x, 4, [4]), own.sum(0, keepdim=True))


def test_float32_is_close_to_float64() -> None:
    assert_close(in_pieces(drawn(257, 128, torch.float32), 128, [257]), by_hand(drawn(257, 128), 128).float())


def test_doors_name_the_numbers() -> None:
    x = drawn(4, 4)
    with pytest.raises(ValueError, match=r"pending kv has shape \[128, 6\], but \[8, 12\]"):
        compress(*x, Pending.fresh(128, WIDTH, torch.float64), 0)
    with pytest.raises(ValueError, match=r"kv has shape \[4, 11\], but \[4, 12\]"):
        compress(x.kv[:, 1:], x.scores, x.ape, Pending.fresh(4, WIDTH, torch.float64), 0)
