"""Q6_K: 210 bytes for 256 elements: a value is d * scale * (level - 32), levels 0..63, in sub-blocks of 16.

128 bytes of low nibbles, 64 bytes of upper two bits, 16 signed scales, F16 d. In each half of 128 elements, byte l of 32
has the upper bits of l, l + 32, l + 64 and l + 96, lowest first; the low nibbles of l and l + 64 share byte l of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import Piece, bytes_of, search_pieces, turn_back
from dsv4_quant.formats.signed import Effort, Signed, whole

BLOCK, BLOCK_BYTES, SUB = 256, 210, 16
# Found by greedy choice on Gaussian and heavy-tailed rows: each lowers the error most beside those before it.
GUESSES = (-32.0, -31.0, -30.0, -29.0)
EFFORT = Effort(guesses=GUESSES, fits=0, rounds=2, divisors=(-128,))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 210]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    nibbles = blocks[..., :128].unflatten(-1, (2, 64))
    low = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
    place = torch.arange(0, 8, 2, dtype=torch.uint8, device=rows.device)[:, None]
    high = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> place & 3).flatten(-2)
    levels = (low | high << 4).flatten(-2).unflatten(-1, (16, SUB)).float() - 32
    step = blocks[..., 208:].contiguous().view(torch.float16).float()
    scale = step * blocks[..., 192:208].contiguous().view(torch.int8)
    return (scale[..., None] * levels).flatten(-3)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 256 * 210] of float rows [n, columns], columns a multiple of 256."""
    return search_pieces(rows, importance, BLOCK, BLOCK_BYTES, SUB, _encode)


def _encode(piece: Piece) -> Tensor:
    choice = Signed(piece, whole(32), grid=128).encode(EFFORT)
    levels = turn_back(choice.values.add_(32)).view(-1, 2, 4, 32)
    low = levels & 15
    high = levels >> 4
    return torch.cat([
        (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1),
        (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1),
        choice.scales.to(torch.int8).view(torch.uint8).T, bytes_of(piece.half(choice.step)),
    ], dim=1)  # fmt: skip


FORMAT = Format("q6_k", BLOCK, BLOCK_BYTES, decode, encode=encode)
