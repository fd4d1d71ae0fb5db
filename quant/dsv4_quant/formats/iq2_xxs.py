"""IQ2_XXS: 66 bytes for 256 elements, an F16 d and, for each 32 elements, four grid points, 28 sign bits and s.

A weight is d / 8 (2 s + 1) times 8, 25 or 43 times its sign. The 32 elements' eight bytes are two little-endian words:
the points of four groups of eight, a byte each, then seven sign bits a group, the first group lowest, and s on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import grids, signed_grid
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.blocks import BLOCK
from dsv4_quant.formats.signed_grid import Coded, Layout

BLOCK_BYTES = 66
GRID = signed_grid.three_levels(grids.iq2_xxs())
_LAYOUT = Layout(GRID, part=32, divisor=8, starts=(0.029, 0.034, 0.039, 0.045))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 66]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    parts = blocks[..., 2:].unflatten(-1, (8, 8))
    s, signs = signed_grid.unpack(parts[..., 4:])
    step = d * (s.float() + 0.5) * 0.25
    return signed_grid.decode(step, parts[..., :4], signs, GRID)


def encode(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [n, columns / 256 * 66] of float rows [n, columns]; importance [columns] or [n, columns] weighs errors."""
    return signed_grid.encode(rows, importance, _LAYOUT, BLOCK_BYTES, _pack)


def _pack(coded: Coded) -> Tensor:
    points = coded.points.to(torch.uint8)
    parts = torch.cat([points, signed_grid.pack(coded)], -1).flatten(1)
    return torch.cat([coded.step[:, None].view(torch.uint8), parts], 1)


FORMAT = Format("iq2_xxs", BLOCK, BLOCK_BYTES, decode, encode=encode)
