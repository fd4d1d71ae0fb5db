from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4_kernels.norm_rope import frequencies, turns
from dsv4_kernels.rounding import ref
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("rounding")
ROUNDINGS = [(gpu.round_fp8, ref.round_fp8), (gpu.round_fp4, ref.round_fp4)]
Rounding = Callable[[Tensor, int], Tensor]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Also the sign of zero."""
    return torch.equal(found.float().view(torch.int32), expected.float().view(torch.int32))


def of_all_sizes(random: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers, each row a power of ten larger than the one before it, from 1e-37 on."""
    powers = torch.arange(shape[0]) % 74 - 37
    return torch.randn(shape, generator=random) * torch.pow(10.0, powers.double()).float().reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize(("rounded", "reference"), ROUNDINGS)
@pytest.mark.parametrize("block", [1, 3, 32, 33, 64, 128])
@pytest.mark.parametrize("blocks", [1, 7])
def test_rounds_to_the_reference_s_bits(rounded: Rounding, reference: Rounding, block: int, blocks: int,
                                        random: torch.Generator) -> None:
    x = of_all_sizes(random, 127, blocks * block)
    assert same_bits(rounded(x, block), reference(x, block))


@pytest.mark.parametrize(("rounded", "reference"), ROUNDINGS)
def test_the_scale_s_own_rounding_leaves_no_code_too_large(rounded: Rounding, reference: Rounding) -> None:
    near = torch.cat([(torch.tensor([448.0, 6.0]) * 2.0 ** power).view(torch.int32) + bit
                      for power in range(-20, 21) for bit in range(-3, 4)]).view(torch.float32)
    assert same_bits(rounded(near, 1), reference(near, 1))


@pytest.mark.parametrize(("rounded", "reference"), ROUNDINGS)
def test_every_exponent_and_its_ties(rounded: Rounding, reference: Rounding) -> None:
    """Every upper half of a float32 but NaN and infinity: each code, each tie, subnormals, both signs; alone and in company."""
    uppers = torch.arange(65536)
    every = uppers[uppers % 32768 < 0x7f80].to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    assert same_bits(rounded(every, 1), reference(every, 1))
    near = every[(every.abs() <= 448) & (every.abs() > 1e-6)]
    company = torch.stack([near, torch.full_like(near, 448), torch.full_like(near, 6), -near], 1).flatten()
    assert same_bits(rounded(company, 4), reference(company, 4))
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-38, 2.0 ** -126])
    assert same_bits(rounded(ends, 1), reference(ends, 1))
    assert same_bits(rounded(ends, 8), reference(ends, 8))


@pytest.mark.parametrize("size", [1, 2, 8, 128, 512])
@pytest.mark.parametrize("rows", [1, 5, 61])
def test_the_turn_equals_the_reference(size: int, rows: int, random: torch.Generator) -> None:
    x = torch.randn(rows, size, generator=random)
    assert_close(gpu.hadamard(x), ref.hadamard(x.double()))


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("shape", [(1,), (64,), (13, 7)])
def test_index_values_are_turned_then_rounded(size: int, shape: tuple[int, ...], random: torch.Generator) -> None:
    x = torch.randn(*shape, size, generator=random)
    assert same_bits(gpu.round_index(x), ref.round_fp4(gpu.hadamard(x), 32))


@pytest.mark.parametrize("size", [1e-38, 2e-38, 1.0, 1e37])
def test_bfloat16_holds_every_rounded_index_value(size: float, random: torch.Generator) -> None:
    """Down to the smallest scale, 2^-126, whose smallest code is no normal number any more."""
    x = torch.randn(40, 32, generator=random).clamp(-1, 1) * size
    rounded = ref.round_index(x)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    assert len(rounded.unique()) > 4
    found = gpu.round_index(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), ref.round_fp4(gpu.hadamard(x), 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_no_number_stays_no_number(bad: float, random: torch.Generator) -> None:
    """A broken value must be seen in the logits, not rounded away."""
    x = torch.randn(2, 128, generator=random)
    x[1, 5], x[1, 127] = bad, bad
    for out in (gpu.round_fp8(x, 64), gpu.round_fp4(x, 32), gpu.round_index(x)):
        assert out[0].isfinite().all()
        assert not out[1, [5, 127]].isfinite().any()


def test_views_and_nothing(random: torch.Generator) -> None:
    x = torch.randn(6, 256, generator=random)[::2, 64:192]
    for rounded in (lambda x: gpu.round_fp8(x, 64), lambda x: gpu.round_fp4(x, 32), gpu.round_index, gpu.hadamard):
        assert same_bits(rounded(x), rounded(x.contiguous()))
        assert rounded(x[:0]).shape == (0, 128)


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    x = torch.randn(3, 128, generator=random, dtype=torch.float64)
    assert torch.equal(gpu.round_fp8(x, 64), ref.round_fp8(x, 64))
    assert torch.equal(gpu.round_index(x), ref.round_index(x))


@pytest.mark.parametrize("pairs", [16, 64])
def test_index_queries_are_turned_in_the_same_launch(pairs: int, random: torch.Generator) -> None:
    x, table = torch.randn(3, 5, 128, generator=random), turns(torch.arange(7, 10), frequencies(2 * pairs, 10000))
    same = gpu.round_index(x, table) == ref.round_index(x, table)
    assert same.float().mean() > 0.99  # sums in another order move a value over the edge between two codes now and then
    assert same_bits(gpu.round_index(x, torch.ones_like(table)), gpu.round_index(x))
