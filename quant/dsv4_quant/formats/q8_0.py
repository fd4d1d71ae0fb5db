"""Q8_0: 34 bytes for 32 elements, an F16 step d and 32 signed bytes; a value is d times its byte."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format

BLOCK, BLOCK_BYTES = 32, 34


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 32 * 34]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    step = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * step).flatten(-2)


def encode(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [o, i / 32 * 34] of a float matrix whose rows are multiples of 32: d = largest / 127, halves away from zero."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    scaled = blocks * inverse
    quants = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled)).to(torch.int8)
    return torch.cat([step.half().view(torch.uint8), quants.view(torch.uint8)], dim=-1).flatten(-2)


FORMAT = Format("q8_0", BLOCK, BLOCK_BYTES, decode, encode=encode)
