from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_kernels.compressor import Pending, ref
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("compressor")


class Inputs(NamedTuple):
    kv: Tensor
    scores: Tensor
    ape: Tensor

    def double(self) -> Inputs:
        return Inputs(*(each.double() for each in self))


def drawn(t: int, ratio: int, d: int, random: torch.Generator, size: float = 1.0) -> Inputs:
    _, width = Pending.shape(ratio, d)
    kv, scores, ape = (torch.randn(rows, width, generator=random) for rows in (t, t, ratio))
    return Inputs(kv, scores * size, ape)


def in_pieces(x: Inputs, ratio: int, sizes: list[int]) -> tuple[Tensor, Pending]:
    pending = Pending.fresh(ratio, x.kv.shape[1] // (2 if ratio == 4 else 1), torch.float32)
    entries, position = [], 0
    for size in sizes:
        piece = slice(position, position + size)
        entries.append(gpu.compress(x.kv[piece], x.scores[piece], x.ape, pending, position))
        position += size
    assert position == len(x.kv)
    return torch.cat(entries), pending


def by_reference(x: Inputs, ratio: int) -> Tensor:
    d = x.kv.shape[1] // (2 if ratio == 4 else 1)
    return ref.compress(*x.double(), Pending.fresh(ratio, d, torch.float64), 0)


@pytest.mark.parametrize("ratio", [3, 4, 128])
@pytest.mark.parametrize("t", [1, 5, 130])
@pytest.mark.parametrize("d", [1, 33])
def test_entries_equal_the_reference(ratio: int, t: int, d: int, random: torch.Generator) -> None:
    x = drawn(t, ratio, d, random)
    entries, _ = in_pieces(x, ratio, [t])
    expected = by_reference(x, ratio)
    assert entries.shape == expected.shape == (t // ratio, d)
    if len(entries):
        assert_close(entries, expected)


@pytest.mark.parametrize("size", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("ratio", [4, 128])
def test_scores_of_any_size(size: float, ratio: int, random: torch.Generator) -> None:
    x = drawn(128, ratio, 24, random, size)
    x = x._replace(ape=torch.zeros_like(x.ape))  # float32 sums of 1000 and 1 would not be those of float64
    assert_close(in_pieces(x, ratio, [128])[0], by_reference(x, ratio))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("d", [5])
@pytest.mark.parametrize("size", [1, 3, 4, 127, 129])
def test_a_prompt_may_be_cut_anywhere(ratio: int, d: int, size: int, random: torch.Generator) -> None:
    """Bitwise, and what is left pending too, as far as it counts: slots that are not filled hold anything."""
    x = drawn(150, ratio, d, random)
    pieces = [size] * (150 // size) + [150 % size] * (150 % size > 0)
    (cut, left), (whole, expected) = in_pieces(x, ratio, pieces), in_pieces(x, ratio, [150])
    assert torch.equal(cut, whole)
    filled = len(left.kv) - ratio + 150 % ratio
    assert torch.equal(left.kv[:filled], expected.kv[:filled])
    assert torch.equal(left.scores[:filled], expected.scores[:filled])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 11), min_size=1, max_size=12))
def test_overlap_survives_every_cut(sizes: list[int]) -> None:
    random = torch.Generator().manual_seed(4)
    x = drawn(sum(sizes), 4, 6, random)
    entries, _ = in_pieces(x, 4, sizes)
    assert torch.equal(entries, in_pieces(x, 4, [sum(sizes)])[0])
    if len(entries):
        assert_close(entries, by_reference(x, 4))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("cut", [3, 130, 257])
def test_what_is_pending_means_the_same_to_the_reference(ratio: int, cut: int, random: torch.Generator) -> None:
    """A state that one of them left is continued by the other."""
    x = drawn(300, ratio, 10, random)
    pending = Pending.fresh(ratio, 10, torch.float32)
    entries = [ref.compress(x.kv[:cut], x.scores[:cut], x.ape, pending, 0)]
    entries.append(gpu.compress(x.kv[cut:270], x.scores[cut:270], x.ape, pending, cut))
    entries.append(ref.compress(x.kv[270:], x.scores[270:], x.ape, pending, 270))
    assert_close(torch.cat(entries), by_reference(x, ratio))


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    x = drawn(12, 4, 8, random)
    x.kv[5, 9], x.scores[6, 3] = float("nan"), float("nan")
    bad = in_pieces(x, 4, [12])[0].isnan()
    assert bad.nonzero().tolist() == [[1, 1], [2, 3]]  # a last half counts for its own group, a first half for the next


def test_views_and_nothing(random: torch.Generator) -> None:
    x = drawn(18, 4, 20, random)
    view = Inputs(x.kv[::2, 8:24], x.scores[::2, 8:24], x.ape[:, 8:24])
    found, expected = in_pieces(view, 4, [9]), in_pieces(Inputs(*(each.clone() for each in view)), 4, [9])
    assert torch.equal(found[0], expected[0])
    assert in_pieces(x, 4, [0, 18])[0].shape == (4, 20)


def test_other_types_and_orders_are_computed_by_the_reference(random: torch.Generator) -> None:
    x = drawn(9, 4, 6, random)
    assert torch.equal(gpu.compress(*x.double(), Pending.fresh(4, 6, torch.float64), 0), by_reference(x, 4))
    fresh = Pending.fresh(4, 6, torch.float32)
    strided = Pending(*(part.T.contiguous().T for part in fresh))
    expected = ref.compress(*x, fresh, 0)
    assert torch.equal(gpu.compress(*x, strided, 0), expected)
    assert torch.equal(strided.kv, fresh.kv)


@pytest.mark.parametrize("ratio", [4, 128])
def test_the_place_in_a_group_is_read_when_the_kernel_runs(ratio: int, random: torch.Generator) -> None:
    """A recorded launch has the host's numbers of another token that completes as many groups."""
    x = drawn(ratio + 3, ratio, 8, random)
    by_host, by_memory = (Pending.fresh(ratio, 8, torch.float32) for _ in range(2))
    at = torch.tensor([0])
    for position in range(ratio + 3):
        token = slice(position, position + 1)
        at.fill_(position)
        like = ratio - 1 if (position + 1) % ratio == 0 else 0
        expected = gpu.compress(x.kv[token], x.scores[token], x.ape, by_host, position)
        assert torch.equal(gpu.compress(x.kv[token], x.scores[token], x.ape, by_memory, like, at), expected)
    assert torch.equal(by_host.kv, by_memory.kv)
    assert torch.equal(by_host.scores, by_memory.scores)
