"""MXFP4 as GGUF stores it: 17 bytes for 32 elements, first the E8M0 scale, then element j low and j + 16 high."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0, fp4
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import Piece, power_of_two, search_pieces, total, turn_back

BLOCK, BLOCK_BYTES = 32, 17
# The codes of the multiples of a half from -6 to 6, where they have one.
_CODES = fp4.nearest(torch.arange(-12, 13) / 2).float()


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
    """uint8 [n, columns / 32 * 17] of float rows [n, columns], columns a multiple of 32.

    Values of FP4 stay exact where no scale is 2^80 times that of a neighbour.
    """
    together = 8 if rows.shape[1] % (8 * BLOCK) == 0 else 1  # blocks side by side are turned faster than one
    return search_pieces(rows, importance, together * BLOCK, together * BLOCK_BYTES, BLOCK, _encode, light=True)


def _encode(piece: Piece) -> Tensor:
    """Of the smallest scale that holds the largest element and the half of it, the one with the lesser error."""
    largest = torch.maximum(piece.x.amax(0), -piece.x.amin(0))
    exponent = torch.frexp(largest).exponent.clamp_(-100, 0)
    inverse = power_of_two(3 - exponent)  # of a scale: the largest comes to lie within 4..8
    wide = torch.where(largest * inverse > fp4.LARGEST, inverse / 2, inverse)
    values, spare = piece.spare(), piece.spare()
    error, narrow_error = (_error(piece, inverse, values, spare) for inverse in (wide, 2 * wide))
    inverse = torch.where(narrow_error < error, 2 * wide, wide)
    halves = _nearest(torch.mul(piece.x, inverse, out=values), spare).mul_(2).add_(12)
    place = spare.view(torch.int32).copy_(halves)
    torch.index_select(_CODES.to(place.device), 0, place.view(-1), out=values.view(-1))
    pairs = values[16:].mul_(16).add_(values[:16])
    scale = (piece.exponent + 128 - torch.frexp(inverse).exponent).clamp_(0, 254).to(torch.uint8)
    return torch.cat([scale.T[..., None], turn_back(pairs)], dim=2).flatten(1)


def _error(piece: Piece, inverse: Tensor, values: Tensor, spare: Tensor) -> Tensor:
    """The weighted squared error [block of 32, block] under these scales, powers of two; `values` and `spare` are buffers."""
    off = _nearest(torch.mul(piece.x, inverse, out=values), spare).mul_(1 / inverse).sub_(piece.x)
    return total(off.mul_(off).mul_(piece.weight))


def _nearest(numbers: Tensor, spare: Tensor) -> Tensor:
    """Replaces float32 numbers, in place, by the nearest of FP4's values; `spare` is a buffer."""
    bits = numbers.clamp_(-fp4.LARGEST, fp4.LARGEST).view(torch.int32)
    torch.bitwise_and(bits, 0x7F800000, out=spare.view(torch.int32))  # the power of two below each size
    shift = spare.clamp_(min=1.0).mul_(1.5 * 2**22)  # what is added to this has no room for less than half of that power
    return numbers.add_(shift).sub_(shift)


FORMAT = Format("mxfp4", BLOCK, BLOCK_BYTES, decode, encode=encode)
