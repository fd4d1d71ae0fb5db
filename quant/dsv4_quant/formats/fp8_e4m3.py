"""FP8 E4M3 with a scale for each tile of 128 x 128: the matrices of the official checkpoints.

A weight is its code (1-4-3 bits, bias 7, largest 448, no infinity) times its tile's scale. Ragged edges have a tile too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_quant.formats import e8m0
from dsv4_quant.formats.base import Format

TILE = 128
LARGEST = 448.0


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of codes [n, columns] and scales [n, ceil(columns / 128)]."""
    assert scales is not None
    values = rows.view(torch.float8_e4m3fn).float()
    spread = e8m0.decode(scales).repeat_interleave(TILE, dim=-1)[..., : values.shape[-1]]
    return values.mul_(spread)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn [o, i], scales float8_e8m0fnu [ceil(o/128), ceil(i/128)]) of a float matrix [o, i].

    The scale is the smallest power of two that keeps its tile within 448; codes are rounded to nearest even.
    """
    o, i = weight.shape
    padded = F.pad(weight.float(), (0, -i % TILE, 0, -o % TILE))
    tiles = padded.view(padded.shape[0] // TILE, TILE, padded.shape[1] // TILE, TILE)
    scales = e8m0.ceiling(tiles.abs().amax((1, 3)), LARGEST)
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:o, :i].contiguous(), e8m0.encode(scales)


FORMAT = Format("fp8_e4m3", 1, 1, decode, scale_rows=TILE)
