"""MXFP4 as GGUF stores it: 17 bytes for 32 elements, first the E8M0 scale, then element j low and j + 16 high."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0, fp4
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import by_pieces, total

BLOCK, BLOCK_BYTES = 32, 17
# The code nearest to each quarter of a unit, from the one that ends at -5 to the one that begins at 5, and its value.
_CODES = fp4.nearest((torch.arange(-21, 21) + 0.5) / 4)
_NEAREST = fp4.VALUES[_CODES.long()]


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 32 * 17]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    pairs = fp4.PAIRS.to(rows.device)[blocks[..., 1:].long()]  # [n, blocks, 16, (j, j + 16)]
    values = pairs.transpose(-1, -2).flatten(-2)
    return (values * e8m0.decode(blocks[..., :1].contiguous())).flatten(-2)


def from_fp4(rows: Tensor, scales: Tensor) -> Tensor:
    """Official FP4 rows [n, columns / 2] with E8M0 scales [n, columns / 32] as MXFP4 bytes: re-paired, nothing rounded."""
    blocks = fp4.codes(rows).unflatten(-1, (-1, BLOCK))
    pairs = blocks[..., :16] | (blocks[..., 16:] << 4)
    return torch.cat([scales.view(torch.uint8)[..., None], pairs], dim=-1).flatten(-2)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 32 * 17] of float rows [n, columns], columns a multiple of 32; values of FP4 stay exact."""
    return by_pieces(rows, importance, BLOCK, BLOCK_BYTES, _encode)


def _encode(blocks: Tensor, weights: Tensor | None) -> Tensor:
    """Of the smallest scale that holds the largest element and the half of it, the one with the lesser error."""
    x = blocks.T.contiguous()
    scale = e8m0.ceiling(x.abs().amax(0), fp4.LARGEST).clamp_(min=2.0**-126)  # its inverse is a number
    weight = None if weights is None else weights.T.contiguous()
    wide, narrow = _places(x, 1 / scale), _places(x, 2 / scale)
    narrower = _error(x, weight, narrow, scale / 2) < _error(x, weight, wide, scale)
    codes = _CODES.to(x.device)[torch.where(narrower, narrow, wide)]
    scale = torch.where(narrower, scale / 2, scale)
    pairs = codes[:16] | codes[16:] << 4
    return torch.cat([e8m0.encode(scale).view(torch.uint8)[:, None], pairs.T], dim=1)


def _places(x: Tensor, inverse: Tensor) -> Tensor:
    """int32: in which quarter of a unit x * inverse lies, 0 for the one that ends at -5, 41 from 5 on."""
    return (x * inverse).mul_(4).floor_().clamp_(-21, 20).to(torch.int32).add_(21)


def _error(x: Tensor, weight: Tensor | None, places: Tensor, scale: Tensor) -> Tensor:
    off = (_NEAREST.to(x.device).index_select(0, places.flatten()).view_as(x) * scale).sub_(x)
    squares = off * off if weight is None else (off * weight).mul_(off)
    return total(squares)


FORMAT = Format("mxfp4", BLOCK, BLOCK_BYTES, decode, encode=encode)
