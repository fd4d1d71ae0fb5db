"""Q2_K: 84 bytes for 256 elements: a value is d * scale * level - dmin * minimum, levels 0..3, in sub-blocks of 16.

16 bytes with a scale (low nibble) and a minimum (high nibble) for each sub-block, 64 bytes of levels (two_bits.py), then
F16 d and dmin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import two_bits
from dsv4_quant.formats.affine import Affine, Effort
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import Piece, bytes_of, search_pieces, turn_back

BLOCK, BLOCK_BYTES, SUB, TOP = 256, 84, 16, 3
# Chosen as Q4_K's.
GUESSES = ((0.0, 0.1), (-0.6, 0.15), (0.6, 0.0), (0.15, -0.1), (-1.05, 0.15), (1.05, 0.1), (-0.3, 0.15), (-0.9, 0.15))
EFFORT = Effort(guesses=GUESSES, fits=1, rounds=4, divisors=(15, 14, 16))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 84]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    steps = blocks[..., 80:].contiguous().view(torch.float16).float()
    scale, minimum = steps[..., :1] * (blocks[..., :16] & 15), steps[..., 1:] * (blocks[..., :16] >> 4)
    levels = two_bits.unpack(blocks[..., 16:80]).unflatten(-1, (16, SUB))
    return (scale[..., None] * levels - minimum[..., None]).flatten(-3)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 256 * 84] of float rows [n, columns], columns a multiple of 256."""
    return search_pieces(rows, importance, BLOCK, BLOCK_BYTES, SUB, _encode)


def _encode(piece: Piece) -> Tensor:
    choice = Affine(piece, TOP, grid=15).encode(EFFORT)
    return torch.cat([
        (choice.scales + 16 * choice.minima).to(torch.uint8).T, two_bits.pack(turn_back(choice.levels)),
        bytes_of(piece.half(choice.step)), bytes_of(piece.half(choice.step_min)),
    ], dim=1)  # fmt: skip


FORMAT = Format("q2_k", BLOCK, BLOCK_BYTES, decode, encode=encode)
