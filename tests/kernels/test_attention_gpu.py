from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.attention import Entries, ref
from dsv4_kernels.cache.packed import pack_kv
from dsv4_kernels.norm_rope import frequencies, turns
from dsv4_kernels.norm_rope.ref import norm_rotate
from dsv4_kernels.rounding import round_kv
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("attention")

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
    assert_close(gpu.sparse_attention(q, recent, entries, sink, window), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3, 17])
@pytest.mark.parametrize("heads", [1, 5, 64])
def test_window(t: int, heads: int, dtype: torch.dtype, random: torch.Generator) -> None:
    for before in (0, 5, WINDOW - 1):
        q, recent, sink = drawn(t, heads, 32, before, random, dtype)
        check(q, recent, None, sink)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_queries_on_other_cards(dtype: torch.dtype, random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's multiply slices of float32 keys too; here two of them, the second ragged."""
    monkeypatch.setattr(gpu, "AMD", True)
    q, recent, sink = drawn(3, 5, 100, 3, random, dtype)
    check(q, recent, some_entries(3, 11, 100, None, random, dtype), sink)


@pytest.mark.parametrize("d", [1, 7, 8, 20, 24, 128])
def test_width(d: int, random: torch.Generator) -> None:
    q, recent, sink = drawn(5, 6, d, 3, random)
    check(q, recent, some_entries(5, 11, d, None, random, torch.float32), sink)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 2, 19])
@pytest.mark.parametrize("n", [1, 31, 130])
@pytest.mark.parametrize("choosing", [False, True])
def test_entries(n: int, t: int, choosing: bool, dtype: torch.dtype, random: torch.Generator) -> None:
    q, recent, sink = drawn(t, 5, 48, WINDOW - 1, random, dtype)
    check(q, recent, some_entries(t, n, 48, min(n, 12) if choosing else None, random, dtype), sink)


def test_no_entry_at_all(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 4, 32, 2, random)
    nothing = Entries(torch.empty(0, 32), torch.zeros(3, dtype=torch.int64), None)
    alone = gpu.sparse_attention(q, recent, None, sink, WINDOW)
    assert torch.equal(gpu.sparse_attention(q, recent, nothing, sink, WINDOW), alone)
    none_chosen = Entries(torch.randn(4, 32), torch.full((3,), 4), torch.full((3, 2), -1))
    assert torch.equal(gpu.sparse_attention(q, recent, none_chosen, sink, WINDOW),
                       gpu.sparse_attention(q, recent, None, sink, WINDOW))


def test_unseen_entries_may_hold_anything(random: torch.Generator) -> None:
    q, recent, sink = drawn(3, 4, 32, 2, random)
    kv = torch.randn(6, 32, generator=random)
    kv[4:] = float("nan")
    visible = torch.tensor([0, 2, 4])
    for chosen in (None, torch.tensor([[0, 5], [1, 4], [3, 5]])):
        assert gpu.sparse_attention(q, recent, Entries(kv, visible, chosen), sink, WINDOW).isfinite().all()


def test_nothing_behind_the_last_entry_is_read(random: torch.Generator) -> None:
    q, recent, sink = drawn(2, 4, 32, 2, random)
    kv = torch.randn(8, 32, generator=random)
    kv[5:] = float("nan")
    for chosen in (None, torch.tensor([[0, 6], [4, 7]])):
        few = Entries(kv[:5], torch.tensor([8, 8]), chosen)
        assert gpu.sparse_attention(q, recent, few, sink, WINDOW).isfinite().all()


def test_great_scores_do_not_overflow(random: torch.Generator) -> None:
    q, recent, sink = drawn(4, 4, 32, 5, random)
    check(100 * q, 100 * recent, None, sink)
    check(q, recent, None, sink - 1e4)
    assert (gpu.sparse_attention(q, recent, None, sink + 1e4, WINDOW) == 0).all()  # the sink takes everything


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    q, recent, sink = drawn(2, 2, 32, 0, random)
    recent[0, 3] = float("nan")
    assert gpu.sparse_attention(q, recent, None, sink, WINDOW).isnan().all()


def test_doubles_go_the_way_of_the_reference(random: torch.Generator) -> None:
    q, recent, sink = (x.double() for x in drawn(3, 4, 32, 2, random))
    assert torch.equal(gpu.sparse_attention(q, recent, None, sink, WINDOW), ref.sparse_attention(q, recent, None, sink, WINDOW))


@pytest.mark.parametrize("choosing", [False, True])
@pytest.mark.parametrize("t", [1, 3])
def test_packed_keys_count_as_they_do_unpacked(t: int, choosing: bool, random: torch.Generator) -> None:
    """The same keys, whose products the interpreter adds in another order; the reference reads packed ones too."""
    d, rotated = 192, 64
    q, recent, sink = drawn(t, 5, d, WINDOW - 1, random)
    entries = some_entries(t, 19, d, 12 if choosing else None, random, torch.float32)
    table = turns(torch.arange(40, 40 + t), frequencies(rotated, 10000))
    near, far = (round_kv(each, rotated) for each in (recent, entries.kv))
    packed = entries._replace(kv=pack_kv(far, rotated))
    for module in (gpu, ref):
        found = module.sparse_attention(q, pack_kv(near, rotated), packed, sink, WINDOW, table)
        unpacked = entries._replace(kv=far.bfloat16())
        assert_close(found, module.sparse_attention(q, near.bfloat16(), unpacked, sink, WINDOW, table))


def test_a_ring_is_read_as_far_as_it_is_filled(random: torch.Generator) -> None:
    """The position comes from memory when the kernel runs."""
    q, ring, sink = drawn(1, 5, 32, WINDOW - 1, random)
    at = torch.tensor([0])
    for position in (0, 6, WINDOW - 1, 3 * WINDOW + 5):
        at.fill_(position)
        partly = torch.where(torch.arange(WINDOW)[:, None] <= position, ring, torch.nan)
        expected = ref.sparse_attention(q.double(), ring[:position + 1].double(), None, sink.double(), WINDOW)
        assert_close(gpu.sparse_attention(q, partly, None, sink, WINDOW, None, at), expected.float())
        assert_close(ref.sparse_attention(q, partly, None, sink, WINDOW, None, at), expected.float())


@pytest.mark.parametrize("keys", [1, 40])  # in one part, and in several that are joined and turned back together
def test_queries_are_normed_and_turned_where_they_are_used(keys: int, random: torch.Generator) -> None:
    d, rotated, t = 96, 32, 2
    q, recent, sink = drawn(t, 5, d, WINDOW - 1, random)
    entries = some_entries(t, keys, d, None, random, torch.float32)
    table = turns(torch.arange(40, 40 + t), frequencies(rotated, 10000))
    wide = entries._replace(kv=entries.kv.double())
    expected = ref.sparse_attention(norm_rotate(q.double(), None, 1e-6, table.to(torch.complex128)), recent.double(), wide,
                                    sink.double(), WINDOW, table.to(torch.complex128))
    for module in (gpu, ref):
        assert_close(module.sparse_attention(q, recent, entries, sink, WINDOW, table, None, 1e-6), expected.float())
