"""IQ3_XXS, IQ2_XS, IQ2_XXS and IQ1_M: decoded as the `gguf` package does, written with smaller errors than llama.cpp's."""

from __future__ import annotations

from functools import partial
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_quant.formats import FORMATS, grids, iq2_xxs, iq3_xxs
from dsv4_quant.formats.nearest import Grid, Vectors
from tests.support import encoders, llama_quantize
from tests.support.encoders import decode, encode, error, importance, same_bits

NAMES = ("iq3_xxs", "iq2_xs", "iq2_xxs", "iq1_m")
# What is left of Gaussian rows when every column matters alike: measured here, with a per cent to spare.
LEFT = {"iq3_xxs": 0.0318, "iq2_xs": 0.0822, "iq2_xxs": 0.108, "iq1_m": 0.177}


sample = partial(encoders.sample, count=16)


# ---- what the bytes mean


def test_grids_are_those_of_gguf() -> None:
    tables = {"IQ2_XXS": grids.iq2_xxs(), "IQ2_XS": grids.iq2_xs(), "IQ3_XXS": grids.iq3_xxs(), "IQ1_M": grids.iq1_m()}
    for name, table in tables.items():
        kind = getattr(gguf.quants, name)
        assert np.array_equal(table.numpy(), kind.grid.reshape(kind.grid_shape)), name


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_decode_as_in_gguf(name: str) -> None:
    size = 40 * FORMATS[name].block_bytes
    stored = torch.randint(0, 256, (300, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(stored.numpy(), Kind[name.upper()])
    assert same_bits(decode(name, stored), expected)
    assert same_bits(decode(name, stored.view(3, 100, size)).flatten(0, 1), expected)


# ---- how near the bytes come


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_below_those_of_llama(name: str, kind: str) -> None:
    rows = sample(kind)
    weights = importance()[: rows.shape[1]]
    stored = encode(name, rows, weights)
    ours = decode(name, stored)
    assert same_bits(ours, gguf.quants.dequantize(stored.numpy(), Kind[name.upper()]))
    theirs = decode(name, llama_quantize.quantize(name, rows, weights))
    assert error(rows, ours, weights) <= 0.97 * error(rows, theirs, weights)


@pytest.mark.parametrize("name", NAMES)
def test_without_importance_all_columns_matter_alike(name: str) -> None:
    rows = sample("gaussian")
    stored = encode(name, rows)
    assert torch.equal(stored, encode(name, rows, torch.full((4096,), 7.0)))
    assert error(rows, decode(name, stored)) < LEFT[name]


@pytest.mark.parametrize("name", NAMES)
def test_important_columns_are_nearer(name: str) -> None:
    rows = sample("gaussian")
    weights = torch.ones(4096)
    weights[1::2] = 0.05
    weighted, plain = decode(name, encode(name, rows, weights)), decode(name, encode(name, rows))
    assert error(rows[:, ::2], weighted[:, ::2]) < 0.85 * error(rows[:, ::2], plain[:, ::2])
    nobody_cares = decode(name, encode(name, rows, torch.zeros(4096)))
    assert error(rows, nobody_cares) < 1.001 * error(rows, plain)


@pytest.mark.parametrize("grid", [iq2_xxs.GRID, iq3_xxs.GRID], ids=["three levels", "eight levels"])
def test_nearest_is_nearest(grid: Grid) -> None:
    random = torch.Generator().manual_seed(6)
    x, w = torch.randn(grid.elements, 500, generator=random), torch.rand(grid.elements, 500, generator=random)
    scale = 0.01 + torch.rand(500, generator=random) * 0.06
    cost, point = grid.nearest(Vectors.of(x, w), scale)
    values = grid.values(torch.arange(grid.points)).double()
    every = (w.double()[:, None] * (x.double()[:, None] - scale.double() * values[:, :, None]) ** 2).sum(0)
    least, total = every.amin(0), (w * x * x).sum(0)
    largest = (w * (x.abs() + scale * float(values.max())) ** 2).sum(0)
    chosen = every.gather(0, point[None])[0]
    assert (chosen - least <= 1e-3 * least).all()
    assert (chosen == least).double().mean() > 0.98
    assert ((cost + total - chosen).abs() <= 1e-3 * largest).all()


# ---- rows that are not like others


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert not decode(name, encode(name, torch.zeros(2, 512))).any()
    rows = sample("gaussian")[:1, :512].clone()
    rows[:, 256:] = 0  # a block of zeros beside another
    assert not decode(name, encode(name, rows))[:, 256:].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, -0.003, 3e4])
def test_constants(name: str, value: float) -> None:
    rows, weights = torch.full((1, 256), value), importance()[:256]
    ours, theirs = (decode(name, quantise(name, rows, weights)) for quantise in (encode, llama_quantize.quantize))
    assert error(rows, ours, weights) <= error(rows, theirs, weights)
    if name != "iq2_xxs":  # whose grid has no eight of 25 and no eight of 43
        assert error(rows, ours) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_harms_its_own_block_only(name: str) -> None:
    clean = sample("gaussian")[:4]
    rows = clean.clone()
    rows[1, 300] = -50.0
    decoded = decode(name, encode(name, rows))
    theirs = decode(name, llama_quantize.quantize(name, rows, torch.ones(4096)))
    assert error(rows, decoded) < error(rows, theirs)
    assert decoded[1, 300] < -20  # its neighbours cannot be 0, which holds it back
    hit = torch.zeros(4, 4096, dtype=torch.bool)
    hit[1, 256:512] = True
    assert torch.equal(decoded[~hit], decode(name, encode(name, clean))[~hit])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-5, 1e30])
def test_any_magnitude_gives_finite_numbers(name: str, size: float) -> None:
    rows = sample("gaussian")[:2, :512] * size
    rows[0, 3], rows[1, 400] = size, 0.0
    decoded = decode(name, encode(name, rows, importance()[:512] * size))
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 2 * max(1e-6, min(float(rows.abs().max()), 2e7))


# ---- how the work is cut


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    rows, weights = sample("heavy"), importance()
    together = encode(name, rows, weights)
    assert torch.equal(encode(name, rows[5:6], weights), together[5:6])
    assert torch.equal(encode(name, rows[3:10], weights.expand(7, -1)), together[3:10])
    assert torch.equal(encode(name, rows.repeat(5, 1), weights), together.repeat(5, 1))
    assert torch.equal(encode(name, rows.half()[:2], weights), encode(name, rows.half().float()[:2], weights))


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_of_the_rows(name: str) -> None:
    rows, weights = torch.empty(3, 512, device="meta"), torch.empty(512, device="meta")  # mixing devices would raise
    stored = encode(name, rows, weights)
    assert stored.device.type == "meta"
    assert stored.shape == (3, 2 * FORMATS[name].block_bytes)
    assert decode(name, stored).shape == (3, 512)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_rows(name: str) -> None:
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.device.type == "cpu":
                largest.append(out.untyped_storage().nbytes())
            return out

    rows = sample("gaussian").repeat(8, 1)
    for count in (64, 128):
        largest.append(0)
        with Watch():
            encode(name, rows[:count], importance())
    assert max(size for size in largest if size != rows.nbytes) <= 2**24


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Rows of 300 are not whole blocks of 256"):
        encode(name, torch.zeros(2, 300))
    with pytest.raises(ValueError, match=r"Importance of shape \(255,\) for rows of shape \(2, 256\)"):
        encode(name, torch.zeros(2, 256), torch.ones(255))
