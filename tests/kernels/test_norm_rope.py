from __future__ import annotations

import math

import pytest
import torch

from dsv4_kernels.norm_rope import Yarn, frequencies, rms_norm, rotate, turns
from tests.support.tolerance import assert_close

YARN = Yarn(factor=16, original_positions=65536, beta_fast=32, beta_slow=1)

# spec/checkpoint.md section 3.4: pair, theta 10000 plain, theta 160000 with YaRN
TABLE = [(0, 1.0, 1.0), (1, 7.498942018e-01, 6.876560450e-01), (2, 5.623413324e-01, 4.728707969e-01), (8, .1, .05),
         (14, 1.778279431e-02, 5.286856554e-03), (15, 1.333521493e-02, 3.635538509e-03), (16, 1.0e-02, 2.265624935e-03),
         (17, 7.498942316e-03, 1.396801323e-03), (20, 3.162277862e-03, 2.969777852e-04), (24, 1.0e-03, 1.953125320e-05),
         (25, 7.498941850e-04, 5.372312444e-06), (31, 1.333521504e-04, 5.680529398e-07)]


@pytest.mark.parametrize(("pair", "plain", "stretched"), TABLE)
def test_frequencies_are_the_published_ones(pair: int, plain: float, stretched: float) -> None:
    assert float(frequencies(64, 10000)[pair]) == pytest.approx(plain, rel=2e-7)
    assert float(frequencies(64, 160000, YARN)[pair]) == pytest.approx(stretched, rel=2e-7)


def test_the_angle_is_a_float32_product() -> None:
    """At a million the angle carries rounding that the reference also has."""
    freqs = frequencies(64, 10000)
    angle = torch.tensor(1_000_003, dtype=torch.float32) * freqs
    table = turns(torch.tensor([1_000_003]), freqs)[0]
    assert torch.equal(table.real, angle.cos())
    assert torch.equal(table.imag, angle.sin())


def test_rotation_turns_adjacent_pairs_at_the_end_of_the_row() -> None:
    x = torch.arange(1, 9, dtype=torch.float64).reshape(1, 8)
    angles = torch.tensor([[0.3, 1.1]], dtype=torch.float64)
    out = rotate(x, torch.polar(torch.ones_like(angles), angles))[0].tolist()
    expected = [1, 2, 3, 4,
                5 * math.cos(.3) - 6 * math.sin(.3), 5 * math.sin(.3) + 6 * math.cos(.3),
                7 * math.cos(1.1) - 8 * math.sin(1.1), 7 * math.sin(1.1) + 8 * math.cos(1.1)]
    assert out == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("shape", [(5, 96), (5, 3, 96), (1, 1, 64), (1, 65)])
def test_turning_back_undoes_the_turn(shape: tuple[int, ...], random: torch.Generator) -> None:
    x = torch.randn(shape, generator=random)
    table = turns(torch.arange(700, 700 + shape[0]), frequencies(64, 160000, YARN))
    there = rotate(x, table)
    assert torch.equal(there[..., :-64], x[..., :-64])
    assert (there - x).abs().max() > 0.1
    assert_close(rotate(there, table, inverse=True), x)


def test_heads_of_a_token_turn_alike(random: torch.Generator) -> None:
    x = torch.randn(3, 2, 8, generator=random)
    table = turns(torch.tensor([4, 5, 9]), frequencies(8, 10000))
    assert_close(rotate(x, table)[:, 1], rotate(x[:, 1], table))


def test_norm_matches_its_formula(random: torch.Generator) -> None:
    x, weight = torch.randn(4, 3, 33, generator=random), torch.randn(33, generator=random)
    wide = x.double()
    expected = wide / (wide.square().sum(-1, keepdim=True) / 33 + 1e-6).sqrt()
    assert_close(rms_norm(x, None, 1e-6), expected.float())
    assert_close(rms_norm(x, weight, 1e-6), (expected * weight).float())
    assert_close(rms_norm(wide, None, 1e-6), expected)


def test_norm_of_nothing_is_nothing() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_doors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"norm weight has shape \[7\], but \[8\]"):
        rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match="6 values per row, fewer than the 8 to rotate"):
        rotate(torch.zeros(1, 6), turns(torch.tensor([0]), frequencies(8, 10000)))
    with pytest.raises(ValueError, match=r"turns has shape \[1, 4\], but \[2, any\]"):
        rotate(torch.zeros(2, 8), turns(torch.tensor([0]), frequencies(8, 10000)))
    with pytest.raises(ValueError, match="rotated dims is 7"):
        frequencies(7, 10000)
