"""IQ3_XXS: 98 bytes for 256 elements, an F16 d, a grid point for each 4 elements, then signs and s for each 32.

A weight is d / 4 (2 s + 1) times a magnitude 4, 12, 20 ... 52, 62 times its sign. The 64 points come first; then eight
little-endian words, each of four times seven sign bits, the first group lowest, and s on top.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import grids, signed_grid
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.blocks import BLOCK
from dsv4_quant.formats.nearest import Grid
from dsv4_quant.formats.signed_grid import Coded, Layout

BLOCK_BYTES = 98


def _grid() -> Grid:
    """Levels are 4 (2 l + 1), but the last 62 in place of 60: linear in l, and in l (l + 1) / 2 squared, but for the last."""
    codes = (grids.iq3_xxs().long() - 4) // 8
    features = (range(8), [level * (level + 1) // 2 for level in range(8)], (0, 0, 0, 0, 0, 0, 0, 1))
    return Grid(codes, (4, 12, 20, 28, 36, 44, 52, 62), features, (8, 0, 62 - 60), (0, 128, 62**2 - 60**2))


GRID = _grid()
_LAYOUT = Layout(GRID, part=32, divisor=4, starts=(0.026, 0.0316, 0.0378))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 98]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    s, signs = signed_grid.unpack(blocks[..., 66:].unflatten(-1, (8, 4)))
    step = d * (s.float() + 0.5) * 0.5
    return signed_grid.decode(step, blocks[..., 2:66].unflatten(-1, (8, 8)), signs, GRID)


def encode(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [n, columns / 256 * 98] of float rows [n, columns]; importance [columns] or [n, columns] weighs errors."""
    return signed_grid.encode(rows, importance, _LAYOUT, BLOCK_BYTES, _pack)


def _pack(coded: Coded) -> Tensor:
    points = coded.points.to(torch.uint8).flatten(1)
    words = signed_grid.pack(coded).flatten(1)
    return torch.cat([coded.step[:, None].view(torch.uint8), points, words], 1)


FORMAT = Format("iq3_xxs", BLOCK, BLOCK_BYTES, decode, encode=encode)
