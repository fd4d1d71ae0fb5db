"""Q8_0: 34 bytes for 32 elements, an F16 step d and 32 signed bytes; a value is d times its byte."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import LARGEST_HALF, by_pieces

BLOCK, BLOCK_BYTES = 32, 34
LEAST_STEP = 2.0**-126  # below, its inverse would be infinite; as a half it is 0 anyway


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 32 * 34]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    step = blocks[..., :2].contiguous().view(torch.float16).float()
    return (blocks[..., 2:].contiguous().view(torch.int8).float() * step).flatten(-2)


def encode(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [n, columns / 32 * 34] of float rows [n, columns], columns a multiple of 32: d = largest / 127, halves away
    from zero. The importance changes nothing: what eight bits lose is the same wherever it is lost."""
    return by_pieces(rows, BLOCK, BLOCK_BYTES, _encode, light=True)


def _encode(blocks: Tensor, row: int) -> Tensor:
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_(max=LARGEST_HALF)
    inverse = torch.where(step >= LEAST_STEP, 1 / step, torch.zeros_like(step))
    scaled = (blocks * inverse).clamp_(-127, 127)
    scaled.add_(torch.copysign(torch.full_like(scaled, 0.5), scaled))  # the conversion cuts the fraction off
    return torch.cat([step.half().view(torch.uint8), scaled.to(torch.int8).view(torch.uint8)], dim=-1)


FORMAT = Format("q8_0", BLOCK, BLOCK_BYTES, decode, encode=encode)
