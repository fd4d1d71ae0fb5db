from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4_kernels.cache.packed import index_bytes, kv_bytes, pack_index, pack_kv, unpack_index, unpack_kv
from dsv4_kernels.rounding import round_index, round_kv

KV_SIZES = [(512, 64), (128, 64), (66, 2), (192, 0)]  # of rows, and of their rotated part
MAGNITUDES = torch.logspace(-30, 30, 61, base=10)


def rows(d: int, random: torch.Generator) -> Tensor:
    """A row of each magnitude from 1e-30 to 1e30; in each a zero and a negative zero, and the last row all zeros."""
    x = torch.randn(len(MAGNITUDES) + 1, d, generator=random)
    x[:-1] *= MAGNITUDES[:, None]
    x[:, 3], x[:, 5] = 0.0, -0.0
    x[-1] = 0
    return x


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_rows_have_the_published_sizes() -> None:
    assert kv_bytes(512, 64) == 448 + 7 + 64 * 2 == 583
    assert index_bytes(128) == 64 + 4 == 68


@pytest.mark.parametrize(("d", "rotated"), KV_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_come_back_bit_for_bit(d: int, rotated: int, dtype: torch.dtype, random: torch.Generator) -> None:
    rounded = round_kv(rows(d, random), rotated)
    packed = pack_kv(rounded.to(dtype), rotated)
    assert (packed.dtype, packed.shape) == (torch.uint8, (len(rounded), kv_bytes(d, rotated)))
    assert same_bits(unpack_kv(packed, rotated), rounded)
    assert same_bits(unpack_kv(packed[7:8], rotated), rounded[7:8])  # at an odd address where the width is odd


@pytest.mark.parametrize("d", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_index_keys_come_back_bit_for_bit(d: int, dtype: torch.dtype, random: torch.Generator) -> None:
    rounded = round_index(rows(d, random))
    packed = pack_index(rounded.to(dtype))
    assert (packed.dtype, packed.shape) == (torch.uint8, (len(rounded), index_bytes(d)))
    assert same_bits(unpack_index(packed), rounded)


def test_every_code_survives_under_the_least_and_the_greatest_scales() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes.view(torch.float8_e4m3fn).float()
    finite = finite[finite.isfinite()]  # 254 codes
    for exponent in (-22, 0, 100):
        block = torch.cat([finite, finite[-2:]]).view(4, 64) * 2.0 ** exponent
        assert same_bits(unpack_kv(pack_kv(block, 0), 0), block)
    signed = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6]).repeat(2)
    for exponent in (-126, 0, 125):
        block = signed[None] * 2.0 ** exponent
        assert same_bits(unpack_index(pack_index(block)), block)


def test_bytes_lie_where_the_format_says() -> None:
    x = torch.zeros(1, 66)
    x[0, :3] = torch.tensor([448.0, -2.0, 0.0])
    x[0, 64:] = torch.tensor([1.0, -3.0])
    assert pack_kv(x, 2)[0].tolist() == [0x7E, 0xC0, 0, *[0] * 61, 127, 0x80, 0x3F, 0x40, 0xC0]
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([1.0, -12.0, 3.0])
    assert pack_index(x)[0].tolist() == [0x1 | 0xF << 4, 0x3, *[0] * 14, 128]


def test_a_block_that_is_not_finite_reads_as_nan_and_spares_its_neighbours() -> None:
    x = torch.ones(1, 130)
    x[0, 70], x[0, 128] = math.inf, -math.inf
    kept = unpack_kv(pack_kv(x, 2), 2)
    assert kept[0, 64:128].isnan().all()
    assert torch.equal(kept[0, :64], x[0, :64])
    assert torch.equal(kept[0, 128:], x[0, 128:])
    x = torch.ones(1, 64)
    x[0, 0] = math.nan
    kept = unpack_index(pack_index(x))
    assert kept[0, :32].isnan().all()
    assert torch.equal(kept[0, 32:], x[0, 32:])


def test_values_that_were_not_rounded_are_refused(random: torch.Generator) -> None:
    x = torch.randn(3, 128, generator=random)
    with pytest.raises(ValueError, match="values were not rounded"):
        pack_kv(x, 64)
    with pytest.raises(ValueError, match="values were not rounded"):
        pack_index(x)
    halfway = round_kv(x, 64)
    halfway[1, 127] = 1 + 2.0 ** -12
    with pytest.raises(ValueError, match="1 of 384 values were not rounded"):
        pack_kv(halfway, 64)


def test_sizes_that_no_blocks_fit_are_refused() -> None:
    for wrong in (lambda: kv_bytes(100, 64), lambda: kv_bytes(64, 64), lambda: index_bytes(48),
                  lambda: unpack_kv(torch.zeros(1, 582, dtype=torch.uint8), 64),
                  lambda: unpack_index(torch.zeros(1, 67, dtype=torch.uint8))):
        with pytest.raises(ValueError, match="must be a positive multiple"):
            wrong()
