"""IQ4_XS: 136 bytes for 256 elements: a value is d * (scale - 32) * VALUES[code], in sub-blocks of 32.

F16 d, two bytes with the upper two bits of the eight scales (lowest first), four bytes with their low nibbles (even scale
low), then 16 bytes for each sub-block: element l low, l + 16 high.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import Piece, bytes_of, search_pieces, turn_back
from dsv4_quant.formats.signed import Effort, Signed

BLOCK, BLOCK_BYTES, SUB = 256, 136, 32
VALUES = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
# Midway between two values is a multiple of a half: all numbers within one half unit have one code. From -127.5 on.
_HALVES = 481
_CODES = torch.bucketize((torch.arange(_HALVES) - 254.5) / 2, (VALUES[1:] + VALUES[:-1]) / 2).float()
_NEAREST = VALUES[_CODES.long()]
# Found by greedy choice on Gaussian and heavy-tailed rows: each lowers the error most beside those before it.
GUESSES = (-127.0, 114.0, -140.0, -108.0, 127.0, -120.0, -133.0, -152.0)
EFFORT = Effort(guesses=GUESSES, fits=1, rounds=3, divisors=(-32, -31, 31))


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 136]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    nibbles = blocks[..., 8:].unflatten(-1, (8, 16))
    values = VALUES.to(rows.device)[torch.cat([nibbles & 15, nibbles >> 4], dim=-1).int()]
    step = blocks[..., :2].contiguous().view(torch.float16).float()
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], dim=-1).flatten(-2)
    place = torch.arange(0, 8, 2, dtype=torch.uint8, device=rows.device)
    high = (blocks[..., 2:4, None] >> place & 3).flatten(-2)
    scale = step * ((low | high << 4).float() - 32)
    return (scale[..., None] * values).flatten(-3)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 256 * 136] of float rows [n, columns], columns a multiple of 256."""
    return search_pieces(rows, importance, BLOCK, BLOCK_BYTES, SUB, _encode)


def _encode(piece: Piece) -> Tensor:
    place = piece.spare().view(torch.int32)
    values, codes = _NEAREST.to(place.device), _CODES.to(place.device)
    choice = Signed(piece, partial(_look_up, values, place), grid=32).encode(EFFORT)
    code = _look_up(codes, place, choice.values)  # [32, 8, n]
    pairs = code[16:].mul_(16).add_(code[:16])
    scales = (choice.scales.T + 32).to(torch.uint8)
    high = (scales >> 4).unflatten(1, (2, 4))
    return torch.cat([
        bytes_of(piece.half(choice.step)),
        high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6,
        (scales[:, 0::2] & 15) | (scales[:, 1::2] & 15) << 4,
        turn_back(pairs).flatten(1),
    ], dim=1)  # fmt: skip


def _look_up(table: Tensor, place: Tensor, numbers: Tensor) -> Tensor:
    """Replaces numbers, in place, by the table's entries for the half units in which they lie; `place` is a buffer."""
    place.copy_(numbers.mul_(2).floor_().clamp_(-255, _HALVES - 256).add_(255))
    torch.index_select(table, 0, place.view(-1), out=numbers.view(-1))
    return numbers


FORMAT = Format("iq4_xs", BLOCK, BLOCK_BYTES, decode, encode=encode)
