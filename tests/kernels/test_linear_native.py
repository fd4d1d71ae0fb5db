from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.linear import Norm, embed, grouped_linear, linear, linears, ref
from dsv4_kernels.native.weights import FORMATS, native
from dsv4_kernels.norm_rope import rms_norm
from dsv4_quant.formats import FORMATS as ALL_FORMATS
from dsv4_quant.formats import Packed, fp4, fp8_e4m3, q8_0
from tests.kernels.native import kernels  # noqa: F401
from tests.support.tolerance import RELATIVE, assert_close, relative_error

pytestmark = pytest.mark.usefixtures("kernels")

AS_THEY_ARE = ("f32", "f16", "bf16", "fp8_e4m3")  # formats that meet activations unrounded
BYTES = [name for name in FORMATS if name not in AS_THEY_ARE]
ROUNDING = 0.02  # what rounding 32 activations to 8 bits may cost a product of random numbers
STEPS = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq2_xxs": (0,), "iq3_xxs": (0,)}


def made(name: str, rows: int, cols: int, random: torch.Generator) -> Packed:
    """A random weight of any native format, with scales of an ordinary size."""
    values = torch.randn(rows, cols, generator=random)
    if name in ("f32", "f16", "bf16"):
        return Packed(name, (rows, cols), values.to({"f32": torch.float32, "f16": torch.float16}.get(name, torch.bfloat16)))
    if name in ("fp8_e4m3", "fp4"):
        data, scale = {"fp8_e4m3": fp8_e4m3, "fp4": fp4}[name].encode(values)
        return Packed(name, (rows, cols), data, scale)
    if name == "q8_0":
        return Packed(name, (rows, cols), q8_0.encode(values))
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    blocks = torch.randint(0, 256, (rows * cols // block, size), generator=random, dtype=torch.uint8)
    if name == "mxfp4":
        blocks[:, 0] = torch.randint(120, 130, (len(blocks),), generator=random, dtype=torch.uint8)
    for place in STEPS.get(name, ()):
        steps = (0.001 + 0.02 * torch.rand(len(blocks), generator=random)).half()
        blocks[:, place:place + 2] = steps[:, None].view(torch.uint8)
    return Packed(name, (rows, cols), blocks.reshape(rows, -1))


def rounded(x: Tensor) -> Tensor:
    """What the kernels make of activations: bytes, 32 with one scale. Float64."""
    blocks = x.unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    return ((blocks * inverse).round().double() * step).flatten(-2)


def columns(name: str) -> list[int]:
    block = ALL_FORMATS[name].block if name != "fp4" else 32
    return [1, 7, 64, 131, 300] if name in AS_THEY_ARE else [block, 3 * block, 5 * block]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 31])
def test_equals_the_reference(name: str, tokens: int, random: torch.Generator) -> None:
    for cols in columns(name):
        for rows in (1, 13, 64):
            weight = made(name, rows, cols, random)
            x = torch.randn(tokens, cols, generator=random)
            met = x.double() if name in AS_THEY_ARE else rounded(x)
            few = rows * tokens < 10  # sums that happen to cancel have no others to make up for them
            assert_close(linear(x, weight), ref.linear(met, weight).float(), 2e-5 if few else None)


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_exact_weights_round_no_activation(name: str, tokens: int, random: torch.Generator) -> None:
    for cols in columns(name):
        weight = replace(made(name, 13, cols, random), exact=True)
        x = torch.randn(tokens, cols, generator=random)
        assert_close(linear(x, weight), ref.linear(x.double(), weight).float())


@pytest.mark.parametrize("name", BYTES)
def test_rounding_the_activations_costs_little(name: str, random: torch.Generator) -> None:
    weight, x = made(name, 64, 1024, random), torch.randn(8, 1024, generator=random)
    assert 0 < relative_error(linear(x, weight), ref.linear(x.double(), weight)) < ROUNDING


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_notice_its_company(name: str, random: torch.Generator) -> None:
    """Bitwise among many: a prompt may be cut anywhere. A few bytes add in another order than many."""
    weight, x = made(name, 22, 1280, random), torch.randn(11, 1280, generator=random)
    whole = linear(x, weight)
    alone = torch.cat([linear(row[None], weight) for row in x])
    assert torch.equal(alone, torch.cat([linear(x[i:i + 3], weight) for i in range(0, 11, 3)]))
    assert torch.equal(whole, torch.cat([linear(x[:4], weight), linear(x[4:], weight)]))
    assert torch.equal(whole, alone) if name in AS_THEY_ARE else relative_error(whole, alone) < RELATIVE[torch.float32]


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_a_row_does_not_notice_its_neighbours(name: str, tokens: int, random: torch.Generator) -> None:
    """Bitwise: rows are dealt to as many threads as there are."""
    weight, x = made(name, 13, 768, random), torch.randn(tokens, 768, generator=random)
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 13)):
        scale = None if weight.scale is None else weight.scale[rows]
        parts.append(linear(x, Packed(name, (rows.stop - rows.start, 768), weight.data[rows], scale)))
    assert torch.equal(linear(x, weight), torch.cat(parts, -1))


@pytest.mark.parametrize("name", ["f32", "fp8_e4m3", "q8_0", "q4_k"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_groups_have_a_matrix_each(name: str, tokens: int, random: torch.Generator) -> None:
    weight, x = made(name, 3 * 150, 256, random), torch.randn(tokens, 3, 256, generator=random)
    met = x.double() if name in AS_THEY_ARE else rounded(x)
    assert_close(grouped_linear(x, weight), ref.grouped_linear(met, weight).float())


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4"])
def test_official_scales_may_be_float32(name: str, random: torch.Generator) -> None:
    weight = made(name, 200, 320, random)
    assert weight.scale is not None
    scale = weight.scale.float() * 1.25  # no power of two
    weight = Packed(name, weight.shape, weight.data, scale)
    x = torch.randn(5, 320, generator=random)
    met = x.double() if name == "fp8_e4m3" else rounded(x)
    assert_close(linear(x, weight), ref.linear(met, weight).float())


@pytest.mark.parametrize("tokens", [1, 6])
def test_the_greatest_bytes_do_not_overflow(tokens: int, random: torch.Generator) -> None:
    """Sums of 16 bits would, where the processor has no others: -128 and 127 throughout."""
    blocks = torch.randint(0, 256, (5 * 3, 34), generator=random, dtype=torch.uint8)
    blocks[:, :2] = torch.tensor([0.01]).half().view(torch.uint8)
    blocks[:, 2:] = torch.where(blocks[:, 2:] > 127, 128, 127)
    weight = Packed("q8_0", (5, 96), blocks.reshape(5, -1))
    x = torch.ones(tokens, 96) - 2 * torch.randint(0, 2, (tokens, 96), generator=random)
    assert_close(linear(x, weight), ref.linear(rounded(x), weight).float())


def test_every_scale_that_e8m0_can_say(random: torch.Generator) -> None:
    """From 2^-127, no normal float32, to 2^127; products beyond float32 are infinite in both."""
    blocks = torch.randint(0, 256, (255, 17), generator=random, dtype=torch.uint8)
    blocks[:, 0] = torch.arange(255, dtype=torch.uint8)
    weight = Packed("mxfp4", (255, 32), blocks)
    x = torch.randn(1, 32, generator=random)
    wanted = ref.linear(rounded(x), weight).float()
    finite = wanted.abs().isfinite() & (wanted.abs() > 1e-30)
    assert finite.sum() > 200
    assert (linear(x, weight) / wanted - 1)[finite].abs().max() < 1e-3  # a wrong power of two would be off by half


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_stays_no_number(bad: float, random: torch.Generator) -> None:
    """A broken activation must be seen in the logits, not rounded away."""
    weight, x = made("q8_0", 8, 64, random), torch.randn(2, 64, generator=random)
    x[1, 40] = bad
    out = linear(x, weight)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


def test_zero_activations_make_zero(random: torch.Generator) -> None:
    assert torch.equal(linear(torch.zeros(5, 256), made("q4_k", 8, 256, random)), torch.zeros(5, 8))


def test_what_has_no_kernel_is_computed_by_the_reference(random: torch.Generator) -> None:
    x = torch.randn(2, 64, generator=random)
    weight = made("q8_0", 4, 64, random)
    assert torch.equal(linear(x.double(), weight), ref.linear(x.double(), weight))
    unusual = Packed("q5_1", (4, 64), torch.randint(0, 60, (4, 48), generator=random, dtype=torch.uint8))
    assert native(unusual) is None
    assert torch.equal(linear(x, unusual), ref.linear(x, unusual))
    assert linear(x[:0], weight).shape == (0, 4)


def test_transposed_and_sliced_activations(random: torch.Generator) -> None:
    weight, x = made("q8_0", 4, 64, random), torch.randn(64, 6, generator=random)
    assert torch.equal(linear(x.T[::2], weight), linear(x.T[::2].contiguous(), weight))
    stacked = torch.randn(2, 3, 64, generator=random)
    assert torch.equal(linear(stacked, weight).reshape(6, 4), linear(stacked.reshape(6, 64), weight))


def test_sliced_weights_stay_where_they_are(random: torch.Generator) -> None:
    """An expert is a slice of a stack; a row of a wider matrix has a longer way to the next one."""
    wide = made("f32", 6, 64, random)
    weight = Packed("f32", (3, 32), wide.data[::2, 8:40])
    x = torch.randn(2, 32, generator=random)
    assert_close(linear(x, weight), ref.linear(x.double(), weight).float())


def test_the_library_is_what_computes(random: torch.Generator) -> None:
    assert backends.pick("linear", "cpu").name == "cpu"
    assert backends.pick("moe", "cpu").name == "cpu"


def test_look_up_tables_are_gguf_s() -> None:
    from dsv4_quant.formats import grids

    gguf.quants.IQ2_XXS.init_grid()
    assert np.array_equal(grids.iq2_xxs().numpy(), gguf.quants.IQ2_XXS.grid.reshape(256, 8))
    gguf.quants.IQ3_XXS.init_grid()
    assert np.array_equal(grids.iq3_xxs().numpy(), gguf.quants.IQ3_XXS.grid.reshape(256, 4))


@pytest.mark.parametrize("names", [("q8_0",), ("q8_0", "mxfp4"), ("fp4", "f32", "q2_k", "q8_0", "bf16"),
                                   ("q4_k", "iq2_xxs", "mxfp4"), tuple(FORMATS), ("q8_0",) * 9])
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 2)])
def test_several_matrices_are_as_one_by_one(names: tuple[str, ...], shape: tuple[int, ...], random: torch.Generator) -> None:
    x = torch.randn(*shape, 768, generator=random)
    weights = [made(name, 1 + 37 * i, 768, random) for i, name in enumerate(names)]
    for found, weight in zip(linears(x, weights), weights, strict=True):
        assert torch.equal(found, linear(x, weight))


def test_among_several_one_may_have_no_kernel(random: torch.Generator) -> None:
    x, weights = torch.randn(1, 64, generator=random), [made("q8_0", 3, 64, random), torch.randn(64, 5, generator=random).T]
    assert [part.shape for part in linears(x, weights)] == [(1, 3), (1, 5)]
    assert_close(linears(x, weights)[1], x @ weights[1].T)
    with pytest.raises(ValueError, match="weight has shape"):
        linears(x[:, 1:], weights)


def test_an_input_is_normed_before_it_is_multiplied(random: torch.Generator) -> None:
    weights = [made("q8_0", 7, 64, random), made("f32", 3, 64, random)]
    x, norm = torch.randn(2, 64, generator=random), Norm(torch.randn(64, generator=random), 1e-6)
    for part, expected in zip(linears(x, weights, norm), linears(rms_norm(x, *norm), weights), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_what_they_decode_to(name: str, random: torch.Generator) -> None:
    for cols in columns(name):
        table, ids = made(name, 5, cols, random), torch.tensor([4, 0, 4])
        found = embed(ids, table)
        assert found.shape == (3, cols)
        assert_close(found, ref.embed(ids, table))
        assert torch.equal(embed(ids, table, 3), found.unsqueeze(1).repeat(1, 3, 1))
    assert embed(ids[:0], table, 2).shape == (0, 2, cols)


def test_a_row_that_there_is_not_is_no_number(random: torch.Generator) -> None:
    found = embed(torch.tensor([-1, 4, 5]), made("q8_0", 5, 64, random))
    assert found.isnan().all(1).tolist() == [True, False, True]
