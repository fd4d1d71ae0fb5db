from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_kernels.backends import pick
from dsv4_kernels.linear import Norm, embed, grouped_linear, linear, ref
from dsv4_kernels.unpack import FLOATS, LAYOUTS
from dsv4_quant.formats import Packed
from tests.kernels.interpreter import QUIET, of
from tests.kernels.test_linear_native import columns, made
from tests.support.tolerance import RELATIVE, assert_close

pytestmark = QUIET

gpu = of("linear")
FORMATS = list(LAYOUTS)
ROUNDED = RELATIVE[torch.bfloat16]  # what tensor cores take; the interpreter rounds nothing, and the bound holds of both


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_few_tokens_equal_the_reference(name: str, tokens: int, random: torch.Generator) -> None:
    assert pick("linear").name == "gpu"
    for cols in columns(name):
        weight = made(name, 7, cols, random)
        x = torch.randn(tokens, cols, generator=random)
        few = 7 * tokens < 60  # sums that happen to cancel have few others to make up for them
        assert_close(linear(x, weight), ref.linear(x.double(), weight).float(), 2e-5 if few else None)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [9, 71])
def test_many_tokens_equal_the_reference(name: str, tokens: int, random: torch.Generator) -> None:
    cols = columns(name)[-1]
    weight = made(name, 67, cols, random)
    x = torch.randn(tokens, cols, generator=random)
    assert_close(linear(x, weight), ref.linear(x.double(), weight).float(), 2e-6 if name == "f32" else ROUNDED)


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_unpacked_to_the_bit(name: str, random: torch.Generator) -> None:
    """By look-up, and by tokens that ask for one column each, so that nothing is summed."""
    cols = columns(name)[-1]
    weight = made(name, 5, cols, random)
    assert torch.equal(embed(torch.tensor([3, 0, 4, 3]), weight), weight.float()[[3, 0, 4, 3]])
    if name not in ("f32", "f16", "bf16", "fp8_e4m3"):
        found = linear(torch.eye(cols)[:8], replace(weight, exact=True))
        assert torch.equal(found, weight.float()[:, :8].T)


@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("name", ["fp8_e4m3", "q8_0", "q4_k", "f32"])
def test_exact_weights_round_nothing(name: str, tokens: int, random: torch.Generator) -> None:
    weight = replace(made(name, 33, 256, random), exact=True)
    x = torch.randn(tokens, 256, generator=random)
    assert_close(linear(x, weight), ref.linear(x.double(), weight).float())


@pytest.mark.parametrize("tokens", [1, 3, 8, 9])
def test_several_matrices_in_one_launch(tokens: int, random: torch.Generator) -> None:
    """Of several formats, one of them twice, one exact; the last tile of each is ragged, and one is a single row."""
    names = ["q8_0", "f32", "q4_k", "iq2_xxs", "q8_0", "bf16", "fp8_e4m3"]
    weights = [made(name, rows, 256, random) for name, rows in zip(names, (67, 1, 64, 7, 130, 13, 2), strict=True)]
    weights[2] = replace(weights[2], exact=True)
    x = torch.randn(tokens, 256, generator=random)
    found = gpu.linears(x, weights)
    assert [part.shape for part in found] == [(tokens, weight.shape[0]) for weight in weights]
    for part, weight in zip(found, weights, strict=True):
        assert torch.equal(part, linear(x, weight))
        assert_close(part, ref.linear(x.double(), weight).float(), 2e-5 if tokens <= gpu.FEW else ROUNDED)


@pytest.mark.parametrize("tokens", [1, 5, 9])
@pytest.mark.parametrize("cols", [1120, 1280])
def test_an_input_is_normed_by_the_launch_that_multiplies_it(cols: int, tokens: int, random: torch.Generator) -> None:
    """One or several fields to a byte, and rows that end within a tile."""
    names = ("q8_0", "f32") if cols % 256 else ("q2_k", "iq2_xxs")
    weights = [made(name, 5, cols, random) for name in names]
    x, norm = 3 * torch.randn(tokens, cols, generator=random), Norm(torch.randn(cols, generator=random), 1e-6)
    expected = ref.linears(x.double(), weights, Norm(norm.weight.double(), norm.eps))
    for part, wanted in zip(gpu.linears(x, weights, norm), expected, strict=True):
        assert_close(part, wanted.float(), 2e-5 if tokens <= gpu.FEW else ROUNDED)


def test_several_matrices_are_few_launches(random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [made(name, 9, 64, random) for name in ("q8_0", "f32", "bf16")]
    monkeypatch.setattr(gpu, "_multiply", None)  # what `linear` launches with
    few = gpu.linears(torch.randn(2, 4, 64, generator=random), weights)
    assert [part.shape for part in few] == [(2, 4, 9)] * 3


@pytest.mark.parametrize("tokens", [1, 5, 18])
@pytest.mark.parametrize("name", ["f32", "fp8_e4m3", "q8_0", "q4_k"])
def test_groups_have_a_matrix_each(name: str, tokens: int, random: torch.Generator) -> None:
    weight, x = made(name, 3 * 35, 256, random), torch.randn(tokens, 3, 256, generator=random)
    assert_close(grouped_linear(x, weight), ref.grouped_linear(x.double(), weight).float(), ROUNDED if tokens > 8 else None)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp4"])
@pytest.mark.parametrize("tokens", [2, 9])
def test_official_scales_may_be_float32_and_tiles_ragged(name: str, tokens: int, random: torch.Generator) -> None:
    weight = made(name, 150, 320, random)
    assert weight.scale is not None
    weight = Packed(name, weight.shape, weight.data, weight.scale.float() * 1.25, exact=True)  # no powers of two
    x = torch.randn(tokens, 320, generator=random)
    assert_close(linear(x, weight), ref.linear(x.double(), weight).float())


def test_every_scale_that_e8m0_can_say(random: torch.Generator) -> None:
    """From 2^-127, no normal float32, to 2^127, and no number."""
    blocks = torch.randint(0, 256, (256, 17), generator=random, dtype=torch.uint8)
    blocks[:, 0] = torch.arange(256)
    weight = Packed("mxfp4", (256, 32), blocks)
    found, expected = embed(torch.arange(256), weight), weight.float()
    assert torch.equal(found[:255], expected[:255])
    assert found[255].isnan().all()


def test_every_code_of_fp8(random: torch.Generator) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    weight = Packed("fp8_e4m3", (1, 256), codes, torch.full((1, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert torch.equal(embed(torch.tensor([0]), weight).nan_to_num(7e6), weight.float().nan_to_num(7e6))


@pytest.mark.parametrize("dtype", list(FLOATS))
def test_plain_tensors_and_views(dtype: torch.dtype, random: torch.Generator) -> None:
    whole = torch.randn(40, 96, generator=random).to(dtype)
    x = torch.randn(2, 3, 50, generator=random)
    view = whole[3:36, 7:57]
    assert_close(linear(x, view), ref.linear(x.double(), view).float())


def test_inputs_may_be_views(random: torch.Generator) -> None:
    weight, x = made("q8_0", 20, 64, random), torch.randn(64, 12, generator=random).T
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight))


@pytest.mark.parametrize("tokens", [2, 10])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_stays_no_number(tokens: int, bad: float, random: torch.Generator) -> None:
    weight, x = made("q8_0", 8, 64, random), torch.randn(tokens, 64, generator=random)
    x[1, 40] = bad
    found = linear(x, weight)
    assert found[[0, *range(2, tokens)]].isfinite().all()
    assert not found[1].isfinite().any()


def test_what_has_no_kernel_goes_the_way_of_the_reference(random: torch.Generator) -> None:
    x = torch.randn(3, 256, generator=random)
    iq3 = made("iq3_xxs", 9, 256, random)
    assert torch.equal(linear(x, iq3), ref.linear(x, iq3))
    weight = made("q8_0", 9, 256, random)
    assert torch.equal(linear(x.double(), weight), ref.linear(x.double(), weight))
    assert linear(x[:0], weight).shape == (0, 9)
    for part, given in zip(gpu.linears(x, [weight, iq3]), (weight, iq3), strict=True):
        assert torch.equal(part, linear(x, given))
    assert [part.shape for part in gpu.linears(x[:0], [weight, weight])] == [(0, 9), (0, 9)]
    assert gpu.linears(x, []) == []
