from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.attention import Entries, ref, sparse_attention
from dsv4_kernels.norm_rope import frequencies, rotate, turns
from tests.kernels.native import kernels  # noqa: F401
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")

WINDOW = 16


def drawn(t: int, heads: int, d: int, before: int, random: torch.Generator, dtype: torch.dtype = torch.float32,
          ) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, window keys and sinks; keys short enough that no head looks at one key alone."""
    q, kv = torch.randn(t, heads, d, generator=random), torch.randn(before + t, d, generator=random)
    return q, kv.to(dtype), torch.randn(heads, generator=random)


def some_entries(t: int, n: int, d: int, k: int | None, random: torch.Generator, dtype: torch.dtype) -> Entries:
    """n entries of which token i sees the first n - t + i; chosen ones with gaps and with some that it may not see."""
    visible = (torch.arange(t) + n - t + 1).clamp(min=0)
    chosen = None
    if k is not None:
        chosen = torch.stack([torch.randperm(n, generator=random)[:k] for _ in range(t)])
        chosen[torch.rand(chosen.shape, generator=random) < .2] = -1
    return Entries(torch.randn(n, d, generator=random).to(dtype), visible, chosen)


def check(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor, window: int = WINDOW) -> None:
    wide = entries._replace(kv=entries.kv.double()) if entries is not None else None
    expected = ref.sparse_attention(q.double(), recent.double(), wide, sink.double(), window)
    assert_close(sparse_attention(q, recent, entries, sink, window), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("heads", [1, 3, 4, 5, 64])
def test_window(t: int, heads: int, dtype: torch.dtype, random: torch.Generator) -> None:
    for before in (0, 5, WINDOW - 1):
        q, recent, sink = drawn(t, heads, 32, before, random, dtype)
        check(q, recent, None, sink)


@pytest.mark.parametrize("d", [1, 7, 8, 20, 24, 128])
def test_width(d: int, random: torch.Generator) -> None:
    q, recent, sink = drawn(5, 6, d, 3, random)
    check(q, recent, some_entries(5, 11, d, None, random, torch.float32), sink)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 2, 19])
@pytest.mark.parametrize("n", [1, 2, 31, 200])
@pytest.mark.parametrize("choosing", [False, True])
def test_entries(n: int, t: int, choosing: bool, dtype: torch.dtype, random: torch.Generator) -> None:
    q, recent, sink = drawn(t, 5, 48, WINDOW - 1, random, dtype)
    check(q, recent, some_entries(t, n, 48, min(n, 12) if choosing else None, random, dtype), sink)


def test_no_entry_at_all(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 4, 32, 2, random)
    nothing = Entries(torch.empty(0, 32), torch.zeros(3, dtype=torch.int64), None)
    assert torch.equal(sparse_attention(q, recent, nothing, sink, WINDOW), sparse_attention(q, recent, None, sink, WINDOW))
    none_chosen = Entries(torch.randn(4, 32), torch.full((3,), 4), torch.full((3, 2), -1))
    assert torch.equal(sparse_attention(q, recent, none_chosen, sink, WINDOW),
                       sparse_attention(q, recent, None, sink, WINDOW))


def test_unseen_entries_may_hold_anything(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 4, 32, 2, random)
    kv = torch.randn(6, 32, generator=random)
    kv[4:] = float("nan")
    visible = torch.tensor([0, 2, 4])
    for chosen in (None, torch.tensor([[0, 5], [1, 4], [3, 5]])):
        assert sparse_attention(q, recent, Entries(kv, visible, chosen), sink, WINDOW).isfinite().all()


def test_nothing_behind_the_last_entry_is_read(random: torch.Generator) -> None:
    q, recent, sink = drawn(2, 4, 32, 2, random)
    kv = torch.randn(8, 32, generator=random)
    kv[5:] = float("nan")
    for chosen in (None, torch.tensor([[0, 6], [4, 7]])):
        few = Entries(kv[:5], torch.tensor([8, 8]), chosen)
        assert sparse_attention(q, recent, few, sink, WINDOW).isfinite().all()


def test_great_scores_do_not_overflow(random: torch.Generator) -> None:
    q, recent, sink = drawn(4, 4, 32, 5, random)
    check(100 * q, 100 * recent, None, sink)
    check(q, recent, None, sink - 1e4)
    assert (sparse_attention(q, recent, None, sink + 1e4, WINDOW) == 0).all()  # the sink takes everything


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    q, recent, sink = drawn(2, 2, 32, 0, random)
    recent[0, 3] = float("nan")
    assert sparse_attention(q, recent, None, sink, WINDOW).isnan().all()


def test_doubles_go_the_way_of_the_reference(random: torch.Generator) -> None:
    q, recent, sink = (x.double() for x in drawn(3, 4, 32, 2, random))
    assert torch.equal(sparse_attention(q, recent, None, sink, WINDOW), ref.sparse_attention(q, recent, None, sink, WINDOW))


@pytest.mark.parametrize(("heads", "d", "pairs"), [(1, 2, 1), (3, 65, 32), (64, 128, 32)])
def test_what_comes_out_is_turned_back(heads: int, d: int, pairs: int, random: torch.Generator) -> None:
    for t in (1, 19):
        q, recent, sink = drawn(t, heads, d, 5, random)
        table = turns(torch.arange(5, 5 + t), frequencies(2 * pairs, 10000))
        straight = sparse_attention(q, recent, None, sink, WINDOW)
        assert torch.equal(sparse_attention(q, recent, None, sink, WINDOW, table), rotate(straight, table, inverse=True))
        expected = ref.sparse_attention(q.double(), recent.double(), None, sink.double(), WINDOW, table.to(torch.complex128))
        assert_close(sparse_attention(q, recent, None, sink, WINDOW, table), expected.float())


@pytest.mark.parametrize("position", [0, 7, WINDOW - 1, 5 * WINDOW + 3])
def test_a_position_in_memory_says_which_of_a_ring_is_seen(position: int, random: torch.Generator) -> None:
    q, ring, sink = drawn(1, 5, 48, WINDOW - 1, random)
    ring[position + 1:] = float("nan")
    entries = some_entries(1, 9, 48, 4, random, torch.float32)
    found = sparse_attention(q, ring, entries, sink, WINDOW, at=torch.tensor([position]))
    assert torch.equal(found, sparse_attention(q, ring[:position + 1], entries, sink, WINDOW))
