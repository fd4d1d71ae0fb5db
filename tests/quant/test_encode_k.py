"""Q8_0, the K formats, IQ4_XS and MXFP4: decoded as the `gguf` package does, written with no larger errors than llama.cpp's."""

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

from dsv4_quant.formats import FORMATS, fp4, search
from tests.support import encoders, llama_quantize
from tests.support.encoders import decode, encode, error, importance, same_bits

SEARCHED = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs", "mxfp4")
NAMES = ("q8_0", *SEARCHED)
# Of llama.cpp's error on Gaussian rows, measured here, and a half per cent to spare.
OF_LLAMA = {"q6_k": 0.935, "q5_k": 0.95, "q4_k": 0.973, "q3_k": 0.988, "q2_k": 0.936, "iq4_xs": 0.953, "mxfp4": 0.957}


sample = partial(encoders.sample, count=24)


# ---- what the bytes mean


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_decode_as_in_gguf(name: str) -> None:
    size = 40 * FORMATS[name].block_bytes
    stored = torch.randint(0, 256, (300, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if name == "mxfp4":
        stored.view(300, 40, -1)[..., 0] %= 255  # no number by the standard of the format, but one in gguf's table
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(stored.numpy(), Kind[name.upper()])
    if name == "mxfp4":
        expected[expected == 0] = 0  # ours keeps the sign of FP4's minus zero
        assert np.array_equal(decode(name, stored).numpy(), expected)
    else:
        assert same_bits(decode(name, stored), expected)
    again = decode(name, stored.view(3, 100, size)).flatten(0, 1)
    assert torch.equal(again.view(torch.int32), decode(name, stored).view(torch.int32))


# ---- how near the bytes come


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "tiny"])
@pytest.mark.parametrize("name", SEARCHED)
def test_errors_are_below_those_of_llama(name: str, kind: str) -> None:
    rows = sample(kind)
    weights = importance()[: rows.shape[1]]
    stored = encode(name, rows, weights)
    ours = decode(name, stored)
    assert same_bits(ours, gguf.quants.dequantize(stored.numpy(), Kind[name.upper()]))
    theirs = decode(name, llama_quantize.quantize(name, rows, weights))
    limit = OF_LLAMA[name] if kind == "gaussian" else 1.0
    assert error(rows, ours, weights) <= limit * error(rows, theirs, weights)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "tiny"])
def test_q8_0_is_llamas(kind: str) -> None:
    rows = sample(kind)
    assert torch.equal(encode("q8_0", rows), llama_quantize.quantize("q8_0", rows, importance()[: rows.shape[1]]))


@pytest.mark.parametrize("name", SEARCHED)
def test_important_columns_are_nearer(name: str) -> None:
    rows = sample("gaussian")
    weights = torch.ones(4096)
    weights[1::2] = 0.05
    weighted, plain = decode(name, encode(name, rows, weights)), decode(name, encode(name, rows))
    assert error(rows[:, ::2], weighted[:, ::2]) < 0.98 * error(rows[:, ::2], plain[:, ::2])
    assert torch.equal(plain, decode(name, encode(name, rows, torch.full((4096,), 7.0))))
    nobody_cares = decode(name, encode(name, rows, torch.zeros(4096)))
    assert error(rows, nobody_cares) < 1.001 * error(rows, plain)


def test_fp4_stays_exact_in_mxfp4() -> None:
    random = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 256, (64, 256), generator=random, dtype=torch.uint8)
    scales = torch.randint(0, 60, (64, 16), generator=random, dtype=torch.uint8)
    scales += torch.randint(10, 180, (64, 1), generator=random, dtype=torch.uint8)
    rows = fp4.decode(codes, scales)
    assert torch.equal(decode("mxfp4", encode("mxfp4", rows, importance()[:512])), rows)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_plain_numbers(name: str, dtype: torch.dtype) -> None:
    rows = torch.cat([sample("heavy"), torch.full((1, 4096), 3.4e38)])
    found = encode(name, rows, importance())
    assert found.dtype == dtype
    assert torch.equal(found[:-1], rows[:-1].to(dtype))
    assert found.isfinite().all()


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
    rows, weights = torch.full((2, 256), value), importance()[:256]
    rows[1, ::2] *= -1
    ours, theirs = (decode(name, quantise(name, rows, weights)) for quantise in (encode, llama_quantize.quantize))
    # sums of float32 cannot tell fits apart that are this good
    assert error(rows, ours, weights) <= max(error(rows, theirs, weights), 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_harms_its_own_block_only(name: str) -> None:
    clean = sample("gaussian")[:4]
    rows = clean.clone()
    rows[1, 300] = -50.0
    decoded = decode(name, encode(name, rows))
    theirs = decode(name, llama_quantize.quantize(name, rows, torch.ones(4096)))
    assert error(rows, decoded) <= error(rows, theirs)
    assert decoded[1, 300] < -45
    hit = torch.zeros(4, 4096, dtype=torch.bool)
    hit[1, 256:512] = True
    assert torch.equal(decoded[~hit], decode(name, encode(name, clean))[~hit])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-12, 1e-5, 1e30, 1e38])
def test_any_magnitude_gives_finite_numbers(name: str, size: float) -> None:
    rows = sample("gaussian")[:2, :512] * size
    rows[0, 3], rows[1, 400] = size, 0.0
    decoded = decode(name, encode(name, rows, importance()[:512] * min(size, 1e37)))
    assert decoded.isfinite().all()
    assert decoded.abs().max() <= 2 * max(1e-6, float(rows.abs().max()))


# ---- how the work is cut


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    rows, weights = sample("heavy"), importance()
    together = encode(name, rows, weights)
    assert torch.equal(encode(name, rows[5:6], weights), together[5:6])
    assert torch.equal(encode(name, rows[3:10], weights.expand(7, -1)), together[3:10])
    assert torch.equal(encode(name, rows.repeat(6, 1), weights), together.repeat(6, 1))  # a second, shorter piece
    assert torch.equal(encode(name, rows.half()[:2], weights), encode(name, rows.half().float()[:2], weights))
    assert encode(name, rows[:0], weights).shape == (0, together.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights, threads = sample("heavy"), importance(), torch.get_num_threads()
    alone = encode(name, rows, weights)
    monkeypatch.setattr(search, "PIECE_CPU", 3 * 4096)
    monkeypatch.setattr(search, "LIGHT_PIECE_CPU", 3 * 4096)
    assert torch.equal(encode(name, rows, weights), alone)
    monkeypatch.undo()
    torch.set_num_threads(3)
    try:
        assert torch.equal(encode(name, rows, weights), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_each_row_may_have_its_own_importance(name: str) -> None:
    rows = sample("gaussian")[:3]
    weights = torch.stack([importance(), importance().flip(0), torch.ones(4096)])
    each = [encode(name, rows[i : i + 1], weights[i]) for i in range(3)]
    assert torch.equal(encode(name, rows, weights), torch.cat(each))


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_of_the_rows(name: str) -> None:
    rows, weights = torch.empty(3, 512, device="meta"), torch.empty(512, device="meta")  # mixing devices would raise
    stored = encode(name, rows, weights)
    assert stored.device.type == "meta"
    assert stored.shape == (3, 512 // FORMATS[name].block * FORMATS[name].block_bytes)
    assert decode(name, stored).shape == (3, 512)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_rows(name: str) -> None:
    fresh: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    fresh[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return out

    rows = torch.zeros(256, 4096)
    with Watch():
        stored = encode(name, rows, importance())
    del fresh[stored.untyped_storage().data_ptr()]
    fresh.pop(rows.untyped_storage().data_ptr(), None)
    assert max(fresh.values()) <= 4 * search.PIECE_CPU


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Rows of 300 are not whole blocks"):
        encode(name, torch.zeros(2, 300))
    if name != "q8_0":
        with pytest.raises(ValueError, match=r"Importance of shape \(255,\) for rows of shape \(2, 256\)"):
            encode(name, torch.zeros(2, 256), torch.ones(255))
