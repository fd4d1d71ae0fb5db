from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.compressor import Pending, compress, ref
from tests.kernels.native import kernels  # noqa: F401
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")


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
        entries.append(compress(x.kv[piece], x.scores[piece], x.ape, pending, position))
        position += size
    assert position == len(x.kv)
    return torch.cat(entries), pending


def by_reference(x: Inputs, ratio: int) -> Tensor:
    d = x.kv.shape[1] // (2 if ratio == 4 else 1)
    return ref.compress(*x.double(), Pending.fresh(ratio, d, torch.float64), 0)


@pytest.mark.parametrize("ratio", [1, 3, 4, 128])
@pytest.mark.parametrize("t", [1, 2, 5, 127, 128, 300])
@pytest.mark.parametrize("d", [1, 7, 33, 512])
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
    x = drawn(256, ratio, 24, random, size)
    x = x._replace(ape=torch.zeros_like(x.ape))  # float32 sums of 1000 and 1 would not be those of float64
    assert_close(in_pieces(x, ratio, [256])[0], by_reference(x, ratio))


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("d", [5, 128])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 127, 128, 129])
def test_a_prompt_may_be_cut_anywhere(ratio: int, d: int, size: int, random: torch.Generator) -> None:
    """Bitwise, and what is left pending too."""
    x = drawn(301, ratio, d, random)
    pieces = [size] * (301 // size) + [301 % size] * (301 % size > 0)
    (cut, left), (whole, expected) = in_pieces(x, ratio, pieces), in_pieces(x, ratio, [301])
    assert torch.equal(cut, whole)
    assert torch.equal(left.kv, expected.kv)
    assert torch.equal(left.scores, expected.scores)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    x = drawn(400, ratio, 10, random)
    pending = Pending.fresh(ratio, 10, torch.float32)
    entries = [ref.compress(x.kv[:cut], x.scores[:cut], x.ape, pending, 0)]
    entries.append(compress(x.kv[cut:300], x.scores[cut:300], x.ape, pending, cut))
    entries.append(ref.compress(x.kv[300:], x.scores[300:], x.ape, pending, 300))
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
    assert backends.pick("compressor", "cpu").name == "cpu"
    x = drawn(9, 4, 6, random)
    assert torch.equal(compress(*x.double(), Pending.fresh(4, 6, torch.float64), 0), by_reference(x, 4))
    fresh = Pending.fresh(4, 6, torch.float32)
    strided = Pending(*(part.T.contiguous().T for part in fresh))
    expected = ref.compress(*x, fresh, 0)
    assert torch.equal(compress(*x, strided, 0), expected)
    assert torch.equal(strided.kv, fresh.kv)


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_position_may_lie_in_memory(ratio: int, random: torch.Generator) -> None:
    x = drawn(ratio + 3, ratio, 40, random)
    expected, pending = in_pieces(x, ratio, [1] * len(x.kv))
    again, found = Pending.fresh(ratio, 40, torch.float32), []
    for position, (kv, scores) in enumerate(zip(x.kv.split(1), x.scores.split(1), strict=True)):
        kind = position % ratio  # all that the host has to know right
        found.append(compress(kv, scores, x.ape, again, kind, torch.tensor([position])))
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(again.kv, pending.kv)
    assert torch.equal(again.scores, pending.scores)
