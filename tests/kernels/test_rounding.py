from __future__ import annotations

import pytest
import torch

from dsv4_kernels.rounding import FP4, FP8, hadamard, round_fp4, round_fp8, round_index, round_kv, scale_exponents
from tests.support.tolerance import assert_close

# spec/checkpoint.md section 3.1: greatest magnitude of a block -> exponent of its scale
FP8_SCALES = [(448, 0), (449, 1), (56, -3), (7, -6), (7.01, -5), (3.5, -7), (1, -8), (30000, 7), (0, -22), (1e-4, -22)]
FP4_SCALES = [(6, 0), (6.01, 1), (12, 1), (5, 0), (3, -1), (1.5, -2), (1, -2), (0, -126)]
FP4_TIES = [(.25, 0), (.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4)]
FP4_VALUES = [0, .5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize(("amax", "exponent"), FP8_SCALES)
def test_fp8_scales_are_the_published_ones(amax: float, exponent: int) -> None:
    assert scale_exponents(torch.tensor([amax]), FP8).tolist() == [exponent]


@pytest.mark.parametrize(("amax", "exponent"), FP4_SCALES)
def test_fp4_scales_are_the_published_ones(amax: float, exponent: int) -> None:
    assert scale_exponents(torch.tensor([amax]), FP4).tolist() == [exponent]


@pytest.mark.parametrize("exponent", range(-13, 14))
def test_exact_powers_of_two_are_not_bumped(exponent: int) -> None:
    assert scale_exponents(torch.tensor([448 * 2.0 ** exponent]), FP8).tolist() == [exponent]


@pytest.mark.parametrize(("value", "code"), FP4_TIES)
def test_fp4_ties_go_to_the_even_code(value: float, code: float) -> None:
    block = torch.zeros(32)
    block[0], block[1], block[2] = 6, value, -value  # the 6 makes the scale 1
    assert round_fp4(block)[:3].tolist() == [6, code, -code]


def test_fp4_rounds_to_the_nearest_code(random: torch.Generator) -> None:
    x = torch.randn(64, 96, generator=random) * torch.logspace(-6, 6, 64, base=10)[:, None]
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 6)))
    grid = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float64)
    nearest = grid[((blocks / scale).unsqueeze(-1) - grid).abs().argmin(-1)] * scale
    assert torch.equal(round_fp4(x).double(), nearest.flatten(-2))


def test_fp8_rounds_half_to_even_and_reaches_its_ends() -> None:
    block = torch.zeros(64)
    block[:6] = torch.tensor([448.0, 17, 19, -17, 2.0 ** -10, 3 * 2.0 ** -10])  # 16, 18, 20 are codes
    assert round_fp8(block)[:6].tolist() == [448, 16, 20, -16, 0, 2 * 2.0 ** -9]


@pytest.mark.parametrize("rounded", [round_fp8, round_fp4])
def test_a_cache_in_bf16_loses_nothing(rounded: object, random: torch.Generator) -> None:
    x = torch.randn(50, 192, generator=random) * torch.logspace(-4, 4, 50, base=10)[:, None]
    once = rounded(x)  # type: ignore[operator]
    assert torch.equal(once.to(torch.bfloat16).float(), once)
    assert torch.equal(rounded(once), once)  # type: ignore[operator]
    assert (once - x).abs().max() > 0


def test_blocks_do_not_see_each_other() -> None:
    x = torch.tensor([1000.0] * 64 + [0.013] * 64)
    assert torch.equal(round_fp8(x)[64:], round_fp8(x[64:]))


def test_hadamard_is_sylvesters_and_its_own_inverse(random: torch.Generator) -> None:
    x = torch.randn(3, 128, generator=random, dtype=torch.float64)
    signs = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(128)] for i in range(128)], dtype=torch.float64)
    assert_close(hadamard(x), x @ signs / 128 ** .5)
    assert_close(hadamard(hadamard(x)), x)


def test_kept_vectors_are_fp8_but_for_the_rotated_values(random: torch.Generator) -> None:
    x = torch.randn(5, 3, 192, generator=random)
    kept = round_kv(x, 64)
    assert torch.equal(kept[..., :128], round_fp8(x[..., :128]))
    assert torch.equal(kept[..., 128:], x[..., 128:].to(torch.bfloat16).float())


def test_index_values_are_turned_then_rounded(random: torch.Generator) -> None:
    x = torch.randn(5, 128, generator=random)
    assert torch.equal(round_index(x), round_fp4(hadamard(x)))


def test_doors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="last axis is 100, but must be a positive multiple of 64"):
        round_fp8(torch.zeros(100))
    with pytest.raises(ValueError, match="last axis is 96, but must be a power of two"):
        hadamard(torch.zeros(96))
    with pytest.raises(ValueError, match="part before the rotated values is 120, but must be a positive multiple of 64"):
        round_kv(torch.zeros(1, 184), 64)
    with pytest.raises(ValueError, match="last axis is 96, but must be a power of two"):
        round_index(torch.zeros(1, 96))
    with pytest.raises(ValueError, match="last axis is 16, but must be a positive multiple of 32"):
        round_index(torch.zeros(1, 16))
