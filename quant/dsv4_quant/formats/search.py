"""What the encoders of block formats share: the walk over pieces, sums in a fixed order, and steps that a half can hold.

Inside a piece numbers lie as [element, sub-block, block], block index last: a sum over a sub-block then adds long rows to
each other, which is what vector units and GPUs are fast at. Every operation rounds once (no fused multiply-add, no
reduction whose order depends on shape or threads), so that a row's bytes depend on nothing but the row and its importance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_CPU, PIECE_GPU = 1 << 16, 1 << 21  # weights at a time: what a core's cache holds; what keeps a GPU busy
LARGEST_HALF = 65504.0
LEAST_WEIGHT = 1e-6  # of a block's largest: an element of no importance still prefers to be near


def by_pieces(rows: Tensor, importance: Tensor | None, block: int, block_bytes: int,
              encode: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """uint8 [n, columns / block * block_bytes] of float rows [n, columns], some blocks at a time.

    `encode` gets float32 [blocks, block] and as many weights, or None, and gives uint8 [blocks, block_bytes].
    ValueError if the columns are no multiple of the block or the importance has another shape.
    """
    count, columns = rows.shape
    if columns % block:
        raise ValueError(f"Rows of {columns} are not whole blocks of {block}.")
    if importance is not None and importance.shape not in ((columns,), (count, columns)):
        raise ValueError(f"Importance of shape {tuple(importance.shape)} for rows of shape {tuple(rows.shape)}.")
    blocks = rows.reshape(-1, block)
    weights = None if importance is None else importance.reshape(-1, block)
    stored = torch.empty(len(blocks), block_bytes, dtype=torch.uint8, device=rows.device)
    piece = (PIECE_CPU if rows.device.type == "cpu" else PIECE_GPU) // block
    for start in range(0, len(blocks), piece):
        end = min(start + piece, len(blocks))
        stored[start:end] = encode(blocks[start:end].float(), _weights(weights, start, end))
    return stored.view(count, columns // block * block_bytes)


def _weights(weights: Tensor | None, start: int, end: int) -> Tensor | None:
    """The weights [end - start, block] of these blocks: those of one row serve every row."""
    if weights is None:
        return None
    return weights[torch.arange(start, end, device=weights.device) % len(weights)].float()


@dataclass
class Piece:
    """Numbers and weights [element, sub-block, block], each block divided by 2^exponent so that it lies within -1..1."""

    x: Tensor
    weight: Tensor
    exponent: Tensor

    def half(self, step: Tensor) -> Tensor:
        """float16 of a step per block, in the units of the weights; what is too large becomes the largest."""
        return _times_power(step, self.exponent).clamp_(-LARGEST_HALF, LARGEST_HALF).half()

    def as_stored(self, step: Tensor) -> Tensor:
        """float32: a step as it is after it was stored as a half."""
        return _times_power(self.half(step).float(), -self.exponent)


def lay_out(blocks: Tensor, weights: Tensor | None, size: int) -> Piece:
    """A piece of blocks [n, block] cut to sub-blocks of `size`."""
    x = blocks.unflatten(1, (-1, size)).permute(2, 1, 0).contiguous()
    exponent = torch.frexp(blocks.abs().amax(1)).exponent.clamp_(-100, 126)
    x.mul_(_times_power(torch.ones_like(x[0, 0]), -exponent))
    if weights is None:
        return Piece(x, torch.ones_like(x), exponent)
    weight = weights.unflatten(1, (-1, size)).permute(2, 1, 0).contiguous()
    weight.div_(weight.amax((0, 1)).clamp_min_(torch.finfo(torch.float32).tiny)).clamp_min_(LEAST_WEIGHT)
    return Piece(x, weight, exponent)


def _times_power(numbers: Tensor, exponent: Tensor) -> Tensor:
    """numbers * 2^exponent for exponents within -126..126."""
    return numbers * ((exponent + 127).to(torch.int32) << 23).view(torch.float32)


def total(terms: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two, half onto half; overwrites the terms."""
    while len(terms) > 2:
        half = len(terms) // 2
        terms = terms[:half].add_(terms[half:])
    return terms[0] + terms[1]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0 (or so near that the ratio has no use)."""
    usable = denominator.abs() > 1e-30
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 0.0)


def bytes_of(step: Tensor) -> Tensor:
    """uint8 [blocks, 2] of halves [blocks]."""
    return step.contiguous().view(torch.uint8).unflatten(0, (-1, 2))
