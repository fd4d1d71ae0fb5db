"""MXFP4 as GGUF stores it: 17 bytes for 32 elements, first the E8M0 scale, then element j low and j + 16 high."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0, fp4
from dsv4_quant.formats.base import Format

BLOCK, BLOCK_BYTES = 32, 17


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 32 * 17]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    pairs = fp4.PAIRS[blocks[..., 1:].long()]  # [n, blocks, 16, (j, j + 16)]
    values = pairs.transpose(-1, -2).flatten(-2)
    return (values * e8m0.decode(blocks[..., :1].contiguous())).flatten(-2)


def from_fp4(rows: Tensor, scales: Tensor) -> Tensor:
    """Official FP4 rows [n, columns / 2] with E8M0 scales [n, columns / 32] as MXFP4 bytes: re-paired, nothing rounded."""
    blocks = fp4.codes(rows).unflatten(-1, (-1, BLOCK))
    pairs = blocks[..., :16] | (blocks[..., 16:] << 4)
    return torch.cat([scales.view(torch.uint8)[..., None], pairs], dim=-1).flatten(-2)


FORMAT = Format("mxfp4", BLOCK, BLOCK_BYTES, decode)
