"""FP4 E2M1 as the official checkpoints store it: two codes a byte, neighbours together, and a scale for 32 in a row.

Byte k of a row holds column 2k in its low nibble and 2k + 1 in its high one. (GGUF's MXFP4 has the same codes and scales,
but pairs element j with j + 16.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.base import Format

BLOCK = 32
LARGEST = 6.0
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PAIRS = torch.stack([VALUES.repeat(16), VALUES.repeat_interleave(16)], dim=1)  # byte -> (low, high)
# Upper ends of the intervals that round to 0, .5, 1, 1.5, 2, 3, 4. A tie goes to the even code.
_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 2] and scales [n, columns / 32]."""
    assert scales is not None
    values = PAIRS[rows.view(torch.uint8).long()].flatten(-2)
    blocks = values.unflatten(-1, (-1, BLOCK))
    return blocks.mul_(e8m0.decode(scales)[..., None]).flatten(-2)


def nearest(values: Tensor) -> Tensor:
    """uint8 codes 0..15 of float values; beyond 6 they saturate, ties go to the even code."""
    size = values.abs()
    code = torch.bucketize(size, _EDGES)  # a tie counts as the lower code...
    tie_up = (code < 7) & (code % 2 == 1) & (size == _EDGES[code.clamp(max=6)])
    code = code + tie_up  # ...which is right where the lower code is even
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes int8 [o, i / 2], scales float8_e8m0fnu [o, i / 32]) of a float matrix whose rows are multiples of 32."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    scales = e8m0.ceiling(blocks.abs().amax(-1), LARGEST)
    codes = nearest(blocks / scales[..., None]).flatten(-2)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).view(torch.int8), e8m0.encode(scales)


def codes(rows: Tensor) -> Tensor:
    """uint8 [n, columns]: the unpacked codes of stored rows [n, columns / 2]."""
    packed = rows.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


FORMAT = Format("fp4", 2, 1, decode, scale_rows=1)
