"""FP8 and FP4 rounding by float32 bits, and the Hadamard product, in plain torch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4_kernels.norm_rope.ref import rotate
from dsv4_kernels.rounding import FP4, FP8, INDEX_BLOCK, KV_BLOCK, Code

EXPONENT = 0x7F800000  # the exponent field of a float32
MANTISSA = 0x007FFFFF


def power_of_two_scale(amax: Tensor, code: Code) -> Tensor:
    """2^ceil(log2(amax / largest)), float32: a full mantissa, added, carries into the exponent unless it meets zero."""
    ratio = amax.to(torch.float32).clamp(min=code.least) * (1 / code.largest)
    return ((ratio.view(torch.int32) + MANTISSA) & EXPONENT).view(torch.float32)


def round_fp8(x: Tensor, block: int) -> Tensor:
    blocks = x.unflatten(-1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), FP8)
    codes = (blocks / scale).clamp(-FP8.largest, FP8.largest).to(torch.float8_e4m3fn)
    return (codes.to(x.dtype) * scale).flatten(-2)


def round_fp4(x: Tensor, block: int) -> Tensor:
    blocks = x.unflatten(-1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), FP4)
    values = (blocks / scale).clamp(-FP4.largest, FP4.largest)
    # Codes are 0.5 apart below 2, then 1, then 2. Ties that go to an even multiple of the step also go to an even code.
    magnitude = values.abs().to(torch.float32).clamp(min=1)
    step = (magnitude.view(torch.int32) & EXPONENT).view(torch.float32) / 2
    return ((values / step).round() * step * scale).flatten(-2)


def hadamard(x: Tensor) -> Tensor:
    return x @ _sylvester(x.shape[-1], x.dtype, x.device)


def round_kv(x: Tensor, rotated: int) -> Tensor:
    still, turned = x.split([x.shape[-1] - rotated, rotated], -1)
    return torch.cat([round_fp8(still, KV_BLOCK), turned.to(torch.bfloat16).to(x.dtype)], -1)


def round_index(x: Tensor, turns: Tensor | None = None) -> Tensor:
    return round_fp4(hadamard(x if turns is None else rotate(x, turns, False)), INDEX_BLOCK)


@lru_cache(maxsize=8)
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix * size ** -0.5
