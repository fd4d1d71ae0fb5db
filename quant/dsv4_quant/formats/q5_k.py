"""Q5_K: 176 bytes for 256 elements: as Q4_K with a fifth bit, levels 0..31.

After d, dmin and the twelve bytes of scales come 32 bytes of fifth bits (bit j of byte l: element l of sub-block j), then
the nibbles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import six_bits
from dsv4_quant.formats.affine import Affine, Effort
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.q4_k import affine_values
from dsv4_quant.formats.search import Piece, bytes_of, search_pieces, turn_back

BLOCK, BLOCK_BYTES, SUB, TOP = 256, 176, 32, 31
# Chosen as Q4_K's.
GUESSES = ((0.0, 0.0), (1.0, -0.02), (-0.6, 0.02), (0.4, 0.0), (-0.2, -0.02), (-1.2, 0.0), (-1.2, -0.02), (-0.4, 0.0))
EFFORT = Effort(guesses=GUESSES, fits=1, rounds=3, divisors=(63, 60, 65))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 176]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    nibbles = blocks[..., 48:].unflatten(-1, (4, 32))
    low = torch.stack([nibbles & 15, nibbles >> 4], dim=-2).flatten(-3, -2)
    place = torch.arange(8, dtype=torch.uint8, device=rows.device)[:, None]
    return affine_values(blocks, low | ((blocks[..., None, 16:48] >> place & 1) << 4))


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 256 * 176] of float rows [n, columns], columns a multiple of 256."""
    return search_pieces(rows, importance, BLOCK, BLOCK_BYTES, SUB, _encode)


def _encode(piece: Piece) -> Tensor:
    choice = Affine(piece, TOP, grid=63).encode(EFFORT)
    levels = turn_back(choice.levels)  # [n, 8, 32]
    fifth = levels >> 4
    bits = fifth[:, 0]
    for j in range(1, 8):
        bits = bits | fifth[:, j] << j
    low = levels & 15
    return torch.cat([
        bytes_of(piece.half(choice.step)), bytes_of(piece.half(choice.step_min)),
        six_bits.pack(choice.scales.T, choice.minima.T),
        bits, (low[:, 0::2] | low[:, 1::2] << 4).flatten(1),
    ], dim=1)  # fmt: skip


FORMAT = Format("q5_k", BLOCK, BLOCK_BYTES, decode, encode=encode)
