"""Every format decodes to what its bytes mean: by the formula written out here, and by the `gguf` package where it knows it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from dsv4_quant.files.gguf_header import TYPES
from dsv4_quant.formats import FORMATS, Packed, e8m0, fp4, fp8_e4m3, mxfp4, q8_0

FP4_TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
DECODED_BY_GGUF = list(gguf.quants._type_traits)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def e4m3(code: int) -> float:
    """1-4-3 bits, bias 7, subnormals, no infinity."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# ---- E8M0


def test_e8m0_means_a_power_of_two_or_nothing() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = e8m0.decode(every.view(torch.float8_e8m0fnu))
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert values[255].isnan()
    assert torch.equal(e8m0.decode(every)[:255], values[:255])
    assert torch.equal(e8m0.encode(values[:255]).view(torch.uint8), every[:255])


# Published for the activations of the reference (spec/checkpoint.md section 3.1); weights follow the same rule.
@pytest.mark.parametrize(
    ("amax", "largest", "exponent"),
    [(448, 448, 0), (449, 448, 1), (56, 448, -3), (7, 448, -6), (7.01, 448, -5), (3.5, 448, -7), (30000, 448, 7),
     (6, 6, 0), (6.01, 6, 1), (12, 6, 1), (5, 6, 0), (3, 6, -1), (1.5, 6, -2), (1, 6, -2)],
)  # fmt: skip
def test_smallest_scale_that_fits(amax: float, largest: float, exponent: int) -> None:
    assert e8m0.ceiling(torch.tensor([amax]), largest).item() == 2.0**exponent


# ---- FP8


def test_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    scale = torch.tensor([[124, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    expected = [e4m3(code) * (2.0**-3 if code < 128 else 2.0**3) for code in range(256)]
    found = Packed("fp8_e4m3", (1, 256), codes, scale).float()[0]
    assert torch.equal(found.nan_to_num(9.0), torch.tensor(expected).nan_to_num(9.0))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 1), (127, 129)])  # whole and ragged tiles
def test_fp8_scales_by_tile(shape: tuple[int, int], scale_dtype: torch.dtype, random: torch.Generator) -> None:
    rows, columns = shape
    codes = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-9, 3, (-(-rows // 128), -(-columns // 128)), generator=random).float())
    packed = Packed("fp8_e4m3", shape, codes, scale.to(scale_dtype))
    found = packed.float()
    for row, column in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2), (rows - 1, 0)]:
        assert found[row, column] == codes[row, column].float() * scale[row // 128, column // 128]
    assert packed.nbytes == rows * columns + scale.numel() * scale_dtype.itemsize


@pytest.mark.parametrize("shape", [(256, 384), (130, 257)])
def test_fp8_encoding(shape: tuple[int, int], random: torch.Generator) -> None:
    weight = torch.randn(shape, generator=random)
    codes, scale = fp8_e4m3.encode(weight)
    decoded = fp8_e4m3.decode(codes, scale.view(torch.uint8).repeat_interleave(128, 0)[: shape[0]])
    # 3 bits of mantissa: half a step is 1/16 of the value, or half of the smallest subnormal times the tile's scale
    assert ((decoded - weight).abs() <= weight.abs() / 16 + 2.0**-10 * e8m0.decode(scale).max()).all()
    again, scale_again = fp8_e4m3.encode(decoded)
    found = fp8_e4m3.decode(again, scale_again.view(torch.uint8).repeat_interleave(128, 0)[: shape[0]])
    assert torch.equal(found, decoded)  # what is stored exactly stays what it is


# ---- FP4


def test_fp4_low_nibble_first() -> None:
    data = torch.tensor([[0x21, 0xF8, *[0] * 14]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = Packed("fp4", (1, 32), data, scale).float()[0]
    assert found[:4].tolist() == [1.0, 2.0, 0.0, -12.0]
    assert torch.signbit(found[2])  # code 8 is minus zero


def test_every_fp4_code_and_scale() -> None:
    """Row r: every code under the scale byte r, but 255."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
    data = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8)
    scale = torch.arange(255, dtype=torch.uint8).view(255, 1)
    table = torch.tensor(FP4_TABLE + [-value for value in FP4_TABLE])
    expected = table.repeat(2) * torch.tensor([2.0 ** (byte - 127) for byte in range(255)])[:, None]
    assert torch.equal(Packed("fp4", (255, 32), data, scale.view(torch.float8_e8m0fnu)).float(), expected)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (0.25, 0),
        (0.26, 0.5),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5, 4),
        (5.01, 6),
        (7, 6),
        (0.74, 0.5),
    ],
)
def test_fp4_ties_go_to_the_even_code(value: float, nearest: float) -> None:
    codes = fp4.nearest(torch.tensor([value, -value]))
    assert [FP4_TABLE[code & 7] for code in codes.tolist()] == [nearest, nearest]
    assert [code >> 3 for code in codes.tolist()] == [0, 1]


def test_fp4_encoding(random: torch.Generator) -> None:
    weight = torch.randn(24, 96, generator=random) * torch.exp2(torch.randint(-8, 8, (24, 1), generator=random).float())
    weight[3, 32:64] = 0
    data, scale = fp4.encode(weight)
    packed = Packed("fp4", (24, 96), data, scale)
    spread = e8m0.decode(scale).repeat_interleave(32, 1)
    distance = torch.tensor([abs(value) for value in FP4_TABLE]) * spread[..., None]
    best = (weight.abs()[..., None] - distance).abs().amin(-1)
    assert torch.equal((packed.float() - weight).abs(), best)
    assert torch.equal(Packed("fp4", (24, 96), *fp4.encode(packed.float())).float(), packed.float())


def test_fp4_becomes_mxfp4_without_rounding(random: torch.Generator) -> None:
    data = torch.randint(0, 256, (40, 64), generator=random, dtype=torch.uint8)
    scale = torch.randint(0, 255, (40, 4), generator=random, dtype=torch.uint8)
    official = Packed("fp4", (40, 128), data.view(torch.int8), scale.view(torch.float8_e8m0fnu)).float()
    repacked = mxfp4.from_fp4(data, scale)
    assert torch.equal(Packed("mxfp4", (40, 128), repacked).float(), official)
    assert np.array_equal(gguf.dequantize(repacked.numpy(), Kind.MXFP4), official.numpy())


# ---- the types of GGUF


def stored(kind: Kind, rows: int, random: torch.Generator) -> Tensor:
    """Random bytes of a block type: rows of two blocks."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = torch.randint(0, 256, (rows, 2, block_bytes), generator=random, dtype=torch.uint8)
    if kind is Kind.MXFP4:
        data[..., 0] %= 255
    return data.flatten(1)


@pytest.mark.parametrize("kind", DECODED_BY_GGUF, ids=lambda kind: kind.name)
def test_what_gguf_decodes_we_decode_alike(kind: Kind, random: torch.Generator) -> None:
    name = kind.name.lower()
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert TYPES[int(kind)] == (name, block, block_bytes)
    assert (FORMATS[name].block, FORMATS[name].block_bytes) == (block, block_bytes)
    data = stored(kind, 6, random)
    if name in ("f32", "f16", "bf16"):
        found = Packed(
            name, (6, 2), data.view({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name])
        )
    else:
        found = Packed(name, (6, 2 * block), data)
    with np.errstate(all="ignore"):  # random bytes hold steps that are infinite or no number
        expected = gguf.dequantize(data.numpy(), kind).reshape(found.shape)
    assert np.array_equal(found.float().numpy(), expected, equal_nan=True)
    picked = torch.tensor([4, 0, 4])
    assert np.array_equal(found.rows(picked).numpy(), expected[[4, 0, 4]], equal_nan=True)
    assert np.array_equal(found.rows(slice(1, 3)).numpy(), expected[1:3], equal_nan=True)


def test_q8_0_is_encoded_as_gguf_does(random: torch.Generator) -> None:
    weight = torch.randn(50, 256, generator=random) * 3
    weight[7, 64:128] = 0
    assert np.array_equal(q8_0.encode(weight).numpy(), gguf.quantize(weight.numpy(), Kind.Q8_0))


def test_every_type_that_a_header_may_name_has_a_size() -> None:
    for number, (name, block, block_bytes) in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (block, block_bytes)
        assert Kind(number).name.lower() == name


# ---- rows


@pytest.mark.parametrize("name", ["bf16", "f32", "fp8_e4m3", "fp4", "mxfp4", "q8_0"])
def test_rows_are_rows_of_the_whole(name: str, random: torch.Generator) -> None:
    weight = torch.randn(300, 160, generator=random)
    packed = {
        "bf16": lambda: Packed("bf16", (300, 160), weight.bfloat16()),
        "f32": lambda: Packed("f32", (300, 160), weight),
        "fp8_e4m3": lambda: Packed("fp8_e4m3", (300, 160), *fp8_e4m3.encode(weight)),
        "fp4": lambda: Packed("fp4", (300, 160), *fp4.encode(weight)),
        "mxfp4": lambda: Packed("mxfp4", (300, 160), mxfp4.from_fp4(*fp4.encode(weight))),
        "q8_0": lambda: Packed("q8_0", (300, 160), q8_0.encode(weight)),
    }[name]()
    whole = packed.float()
    assert whole.dtype == torch.float32
    assert whole.shape == (300, 160)
    for index in (torch.tensor([299, 0, 127, 128, 128]), slice(120, 140), torch.tensor([], dtype=torch.long)):
        assert torch.equal(packed.rows(index), whole[index])


def test_vectors_and_tables_keep_their_shape() -> None:
    assert Packed("bf16", (5,), torch.ones(5, dtype=torch.bfloat16)).float().shape == (5,)
    table = torch.tensor([[3, -1], [2, 129279]])
    assert Packed("i64", (2, 2), table).rows(torch.tensor([1])).tolist() == [[2, 129279]]
    assert Packed("i8", (2,), torch.tensor([-3, 4], dtype=torch.int8)).float().tolist() == [-3, 4]
