from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from dsv4_kernels.linear import Norm, embed, grouped_linear, linear, linears
from dsv4_quant.formats import FORMATS, Packed
from tests.support.tolerance import assert_close

ROWS, COLUMNS = 5, 512  # two of the longest blocks a row
GGUF_TYPES = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}
BLOCKED = sorted(name for name in FORMATS if name in GGUF_TYPES and FORMATS[name].block > 1 and name != "fp4")


def blocks(name: str, random: torch.Generator) -> tuple[Packed, Tensor]:
    """Random blocks of a GGUF type, and what the `gguf` package says they mean. Bytes below 60 are finite as F16 halves."""
    width = COLUMNS // FORMATS[name].block * FORMATS[name].block_bytes
    data = torch.randint(0, 60, (ROWS, width), generator=random, dtype=torch.uint8)
    return Packed(name, (ROWS, COLUMNS), data), torch.from_numpy(gguf.dequantize(data.numpy(), GGUF_TYPES[name]).copy())


@pytest.mark.parametrize("name", BLOCKED)
def test_every_block_type_multiplies_as_it_decodes(name: str, random: torch.Generator) -> None:
    weight, meaning = blocks(name, random)
    meaning = meaning.reshape(ROWS, COLUMNS).double()
    x = torch.randn(3, COLUMNS, generator=random)
    assert meaning.abs().max() > 0
    assert_close(linear(x, weight), (x.double() @ meaning.T).float())
    assert_close(embed(torch.tensor([4, 0, 4]), weight), meaning[[4, 0, 4]].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_numbers_multiply_as_they_are(dtype: torch.dtype, random: torch.Generator) -> None:
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    data = torch.randn(ROWS, COLUMNS, generator=random).to(dtype)
    weight = Packed(names[dtype], (ROWS, COLUMNS), data)
    x = torch.randn(3, COLUMNS, generator=random)
    assert_close(linear(x, weight), (x.double() @ data.double().T).float())
    assert_close(linear(x.double(), weight), x.double() @ data.double().T)  # activations decide the precision
    assert torch.equal(embed(torch.tensor([2]), weight), data[2:3].float())


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e8m0fnu])
def test_fp8_tiles_have_a_scale_each(stored: torch.dtype, random: torch.Generator) -> None:
    """200 x 300: two by three tiles, ragged at both edges; scales as the chat and as the Base releases store them."""
    codes = (32 * torch.randn(200, 300, generator=random)).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.arange(-3, 3).float().reshape(2, 3))
    meaning = torch.stack([codes[o].double() * scale[o // 128, torch.arange(300) // 128] for o in range(200)])
    weight = Packed("fp8_e4m3", (200, 300), codes, scale.to(stored))
    x = torch.randn(3, 300, generator=random)
    assert_close(linear(x, weight), (x.double() @ meaning.T).float())
    assert_close(grouped_linear(x[:, None].repeat(1, 2, 1), weight).flatten(1), (x.double() @ meaning.T).float())


def test_fp4_keeps_its_first_code_in_the_low_nibble(random: torch.Generator) -> None:
    values = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    data = torch.randint(0, 256, (ROWS, 32), generator=random, dtype=torch.uint8)
    scale = torch.exp2(torch.arange(2 * ROWS).float().reshape(ROWS, 2) - 4)
    meaning = torch.zeros(ROWS, 64, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(64):
            byte = int(data[row, column // 2])
            meaning[row, column] = values[byte % 16 if column % 2 == 0 else byte // 16] * scale[row, column // 32]
    weight = Packed("fp4", (ROWS, 64), data.view(torch.int8), scale.to(torch.float8_e8m0fnu))
    x = torch.randn(3, 64, generator=random)
    assert_close(linear(x, weight), (x.double() @ meaning.T).float())


def test_groups_have_matrices_of_their_own(random: torch.Generator) -> None:
    x, weight = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((5, 3, 7), (12, 7)))
    out = grouped_linear(x, weight)
    assert out.shape == (5, 3, 4)
    for group in range(3):
        assert_close(out[:, group], x[:, group] @ weight[4 * group:4 * group + 4].T)


def test_inputs_may_have_any_leading_shape(random: torch.Generator) -> None:
    x, weight = torch.randn(2, 3, 8, generator=random), torch.randn(5, 8, generator=random)
    assert_close(linear(x, weight), (x.double() @ weight.double().T).float())


def test_doors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[5, 8\], but \[any, 7\]"):
        linear(torch.zeros(1, 7), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="weight rows is 5, but must be a positive multiple of 3"):
        grouped_linear(torch.zeros(1, 3, 8), torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"ids has shape \[1, 1\]"):
        embed(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(5, 8))


def test_an_input_may_be_normed_first(random: torch.Generator) -> None:
    x, norm = torch.randn(3, 8, generator=random, dtype=torch.float64), torch.randn(8, generator=random, dtype=torch.float64)
    weights = [torch.randn(rows, 8, generator=random, dtype=torch.float64) for rows in (2, 5)]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm
    for part, weight in zip(linears(x, weights, Norm(norm, 1e-3)), weights, strict=True):
        assert_close(part, normed @ weight.T)
    with pytest.raises(ValueError, match="norm weight"):
        linears(x, weights, Norm(norm[:4], 1e-3))
