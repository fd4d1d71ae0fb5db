from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.cache.packed import pack_index
from dsv4_kernels.indexer import ref
from dsv4_kernels.rounding import round_index
from tests.kernels.interpreter import QUIET, of

pytestmark = QUIET

gpu = of("indexer")


def drawn(t: int, heads: int, d: int, n: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of small whole numbers, so that scores are exact, and ties happen."""
    q = torch.randint(-3, 4, (t, heads, d), generator=random).float()
    return q, torch.randint(-2, 5, (t, heads), generator=random).float(), \
        torch.randint(-3, 4, (n, d), generator=random).float()


def check(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> None:
    """The chosen have the k best scores, none is there twice, and what is not there could not be better."""
    found = gpu.top_indices(q, weights, keys, visible, k)
    scores = ref.index_scores(q, weights, keys.float())
    assert found.shape == (len(q), min(k, len(keys)))
    for row, all_scores, count in zip(found, scores, visible.clamp(max=len(keys)).tolist(), strict=True):
        chosen = row[row >= 0]
        assert len(chosen) == min(k, count)
        assert len(chosen.unique()) == len(chosen)
        assert (chosen < count).all()
        best = all_scores[:count].sort(descending=True).values[:len(chosen)]
        assert torch.equal(all_scores[chosen].sort(descending=True).values, best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("heads", [1, 20])
def test_the_best_are_chosen(t: int, heads: int, dtype: torch.dtype, random: torch.Generator) -> None:
    for n, k in ((1, 1), (7, 3), (130, 64), (300, 1), (65, 65), (40, 100)):
        q, weights, keys = drawn(t, heads, 24, n, random)
        visible = torch.randint(0, n + 1, (t,), generator=random)
        check(q, weights, keys.to(dtype), visible, k)
        check(q, weights, keys.to(dtype), torch.full((t,), n), k)


@pytest.mark.parametrize("d", [1, 5, 8, 100, 128])
def test_width(d: int, random: torch.Generator) -> None:
    q, weights, keys = drawn(3, 4, d, 50, random)
    check(q, weights, keys, torch.tensor([50, 20, 3]), 10)


@pytest.mark.parametrize("t", [1, 4])
def test_ties_go_to_the_earlier_entry(t: int) -> None:
    q, weights, keys = torch.ones(t, 2, 8), torch.ones(t, 2), torch.ones(9, 8)
    keys[5] = 2
    found = gpu.top_indices(q, weights, keys, torch.full((t,), 9), 3)
    assert found.sort().values.tolist() == [[0, 1, 5]] * t


def test_who_sees_nothing_chooses_nothing(random: torch.Generator) -> None:
    q, weights, keys = drawn(2, 4, 8, 6, random)
    assert (gpu.top_indices(q, weights, keys, torch.zeros(2, dtype=torch.int64), 3) == -1).all()


def test_unseen_keys_may_hold_anything(random: torch.Generator) -> None:
    q, weights, keys = drawn(1, 4, 8, 6, random)
    keys[4:] = float("nan")
    assert set(gpu.top_indices(q, weights, keys, torch.tensor([4]), 2).flatten().tolist()) <= {0, 1, 2, 3}


def test_no_number_does_not_disturb_the_search(random: torch.Generator) -> None:
    """As in torch it counts as the greatest."""
    q, weights, keys = drawn(2, 4, 8, 200, random)
    keys[::3] = float("nan")
    found = gpu.top_indices(q, weights, keys, torch.full((2,), 200), 20)
    assert (found % 3 == 0).all()


def test_doubles_go_the_way_of_the_reference(random: torch.Generator) -> None:
    q, weights, keys = (x.double() for x in drawn(2, 4, 8, 30, random))
    visible = torch.full((2,), 30)
    assert torch.equal(gpu.top_indices(q, weights, keys, visible, 5), ref.top_indices(q, weights, keys, visible, 5))


@pytest.mark.parametrize("t", [1, 3])
def test_packed_keys_count_as_they_do_unpacked(t: int, random: torch.Generator) -> None:
    q, weights = torch.randn(t, 5, 64, generator=random), torch.rand(t, 5, generator=random)
    keys, visible = round_index(torch.randn(70, 64, generator=random)), torch.arange(70 - t + 1, 71)
    for module in (gpu, ref):
        found = module.top_indices(q, weights, pack_index(keys), visible, 9)
        assert torch.equal(found.sort().values, module.top_indices(q, weights, keys, visible, 9).sort().values)


@pytest.mark.parametrize("form", ["packed", "bfloat16", "float32"])
def test_rounded_queries_are_taken_in_half_the_bytes(form: str, random: torch.Generator) -> None:
    """As bfloat16, which holds them: the same scores, so the same choice, by one product instead of three."""
    q, weights = round_index(torch.randn(3, 5, 64, generator=random)), torch.randn(3, 5, generator=random)
    keys, visible = round_index(torch.randn(70, 64, generator=random)).float(), torch.tensor([70, 40, 7])
    assert q.dtype == torch.bfloat16
    given = pack_index(keys) if form == "packed" else keys.to(getattr(torch, form))
    found = gpu.top_indices(q, weights, given, visible, 9)
    assert torch.equal(found, gpu.top_indices(q.float(), weights, given, visible, 9))
    assert torch.equal(found.sort().values, ref.top_indices(q, weights, given, visible, 9).sort().values)
