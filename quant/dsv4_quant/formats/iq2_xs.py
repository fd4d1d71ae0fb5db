"""IQ2_XS: 74 bytes for 256 elements, an F16 d, a word for each 8 elements and a four-bit s for each 16.

A weight is d / 8 (2 s + 1) times 8, 25 or 43 times its sign. A word of two bytes has the grid point in its low nine bits
and seven sign bits above; the scales' bytes come last, of two neighbours the first one low.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import grids, signed_grid
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.blocks import BLOCK
from dsv4_quant.formats.signed_grid import Coded, Layout

BLOCK_BYTES = 74
GRID = signed_grid.three_levels(grids.iq2_xs())
_LAYOUT = Layout(GRID, part=16, divisor=8, starts=(0.028, 0.034, 0.041))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 74]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    words = blocks[..., 2:66].unflatten(-1, (16, 2, 2)).int()
    words = words[..., 0] | words[..., 1] << 8
    s = torch.stack([blocks[..., 66:] & 15, blocks[..., 66:] >> 4], -1).flatten(-2)
    step = d * (s.float() + 0.5) * 0.25
    return signed_grid.decode(step, words & 511, words >> 9, GRID)


def encode(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [n, columns / 256 * 74] of float rows [n, columns]; importance [columns] or [n, columns] weighs errors."""
    return signed_grid.encode(rows, importance, _LAYOUT, BLOCK_BYTES, _pack)


def _pack(coded: Coded) -> Tensor:
    words = signed_grid.bytes_of(coded.points | coded.signs << 9, 2).flatten(1)
    s = (coded.scales[:, 0::2] | coded.scales[:, 1::2] << 4).to(torch.uint8)
    return torch.cat([coded.step[:, None].view(torch.uint8), words, s], 1)


FORMAT = Format("iq2_xs", BLOCK, BLOCK_BYTES, decode, encode=encode)
