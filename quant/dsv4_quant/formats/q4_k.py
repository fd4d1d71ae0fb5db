"""Q4_K: 144 bytes for 256 elements: a value is d * scale * level - dmin * minimum, levels 0..15.

F16 d and dmin, twelve bytes of scales and minima (six_bits.py), then 32 bytes for each two of the eight sub-blocks: the
even one in the low nibbles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import six_bits
from dsv4_quant.formats.affine import Affine, Effort
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import Piece, bytes_of, search_pieces, turn_back

BLOCK, BLOCK_BYTES, SUB, TOP = 256, 144, 32, 15
# Found by greedy choice on Gaussian and heavy-tailed rows: each lowers the error most beside those before it.
GUESSES = ((0.0, 0.02), (-0.8, 0.04), (0.6, 0.0), (-1.0, 0.0), (-0.2, 0.0), (0.4, -0.02), (-0.4, 0.04), (1.0, 0.0))
EFFORT = Effort(guesses=GUESSES, fits=1, rounds=3, divisors=(63, 60, 65))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 144]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    nibbles = blocks[..., 16:].unflatten(-1, (4, 32))
    levels = torch.stack([nibbles & 15, nibbles >> 4], dim=-2).flatten(-3, -2)
    return affine_values(blocks, levels)


def affine_values(blocks: Tensor, levels: Tensor) -> Tensor:
    """float32 [n, columns] of blocks [n, blocks, bytes] that begin as Q4_K's do, and their levels [n, blocks, 8, 32]."""
    steps = blocks[..., :4].contiguous().view(torch.float16).float()
    scales, minima = six_bits.unpack(blocks[..., 4:16])
    scale, minimum = steps[..., :1] * scales, steps[..., 1:] * minima
    return (scale[..., None] * levels - minimum[..., None]).flatten(-3)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 256 * 144] of float rows [n, columns], columns a multiple of 256."""
    return search_pieces(rows, importance, BLOCK, BLOCK_BYTES, SUB, _encode)


def _encode(piece: Piece) -> Tensor:
    choice = Affine(piece, TOP, grid=63).encode(EFFORT)
    pairs = choice.levels[:, 0::2] + 16 * choice.levels[:, 1::2]  # [32, 4, n]
    return torch.cat([
        bytes_of(piece.half(choice.step)), bytes_of(piece.half(choice.step_min)),
        six_bits.pack(choice.scales.T, choice.minima.T),
        turn_back(pairs).flatten(1),
    ], dim=1)  # fmt: skip


FORMAT = Format("q4_k", BLOCK, BLOCK_BYTES, decode, encode=encode)
