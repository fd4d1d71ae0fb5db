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

# Weights at a time. A search makes hundreds of calls for each piece, which must be worth their cost (and, with several
# threads, the wait for Python's lock); where little is computed, the nearer cache counts for more.
PIECE_CPU, LIGHT_PIECE_CPU, PIECE_GPU = 1 << 19, 1 << 18, 1 << 21
LARGEST_HALF = 65504.0
LEAST_WEIGHT = 1e-6  # of a block's largest: an element of no importance still prefers to be near


class Scratch:
    """Buffers that serve every piece of a call: to touch fresh memory costs more than several passes of arithmetic."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._taken = 0

    def give_back(self) -> None:
        """Everything taken may be taken again."""
        self._taken = 0

    def take(self, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of this shape on this device, of at most 32 bits each, with anything in them."""
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(like.numel(), device=like.device))
        self._taken += 1
        return self._buffers[self._taken - 1].view(dtype)[: like.numel()].view(like.shape)


@dataclass
class Piece:
    """Numbers and weights [element, sub-block, block], each block divided by 2^exponent so that it lies within -1..1."""

    x: Tensor
    weight: Tensor
    exponent: Tensor
    scratch: Scratch

    def spare(self) -> Tensor:
        """A buffer of x's shape."""
        return self.scratch.take(self.x)

    def half(self, step: Tensor) -> Tensor:
        """float16 of a step per block, in the units of the rows; what is too large becomes the largest."""
        return (step * power_of_two(self.exponent)).clamp_(-LARGEST_HALF, LARGEST_HALF).half()

    def as_stored(self, step: Tensor) -> Tensor:
        """float32: a step as it is after it was stored as a half."""
        return self.half(step).float() * power_of_two(-self.exponent)


def by_pieces(rows: Tensor, block: int, block_bytes: int, encode: Callable[[Tensor, int], Tensor],
              light: bool = False) -> Tensor:
    """uint8 [n, columns / block * block_bytes] of float rows [n, columns], some rows at a time.

    `encode` gets float32 blocks [b, block] and the number of the first row, and gives uint8 [b, block_bytes].
    `light`: it computes little. ValueError if the columns are no multiple of the block.
    """
    count, columns = rows.shape
    _demand_blocks(columns, block)
    stored = torch.empty(count, columns // block * block_bytes, dtype=torch.uint8, device=rows.device)
    step = _rows_at_a_time(rows, light)
    for row in range(0, count, step):
        found = encode(rows[row : row + step].float().reshape(-1, block), row)
        stored[row : row + step] = found.view(-1, stored.shape[1])
    return stored


def _rows_at_a_time(rows: Tensor, light: bool) -> int:
    """How many rows make a piece."""
    on_cpu = LIGHT_PIECE_CPU if light else PIECE_CPU
    return max(1, (on_cpu if rows.device.type == "cpu" else PIECE_GPU) // max(1, rows.shape[1]))


def importance_for(rows: Tensor, importance: Tensor | None, block: int) -> Tensor:
    """The importance of rows [n, columns]: [columns], also where all count alike (None), or [n, columns].

    ValueError if it has another shape, or the columns are no multiple of the block.
    """
    _demand_blocks(rows.shape[1], block)
    if importance is None:
        return torch.ones(rows.shape[1], device=rows.device)
    if importance.shape not in (rows.shape[1:], rows.shape):
        raise ValueError(f"Importance of shape {tuple(importance.shape)} for rows of shape {tuple(rows.shape)}.")
    return importance


def search_pieces(rows: Tensor, importance: Tensor | None, block: int, block_bytes: int, size: int,
                  encode: Callable[[Piece], Tensor]) -> Tensor:
    """As by_pieces, for an encoder of pieces with sub-blocks of `size`; importance as for importance_for."""
    count, columns = rows.shape
    importance = importance_for(rows, importance, block)
    step = min(count, _rows_at_a_time(rows, light=False))
    shared = _weights(importance.expand(step, columns), block, size) if importance.dim() == 1 else None
    scratch = Scratch()

    def encode_blocks(blocks: Tensor, row: int) -> Tensor:
        if shared is None:
            weight = _weights(importance[row : row + step], block, size)
        else:
            weight = shared[..., : len(blocks)].contiguous()
        scratch.give_back()
        return encode(_lay_out(blocks, weight, size, scratch))

    return by_pieces(rows, block, block_bytes, encode_blocks)


def _demand_blocks(columns: int, block: int) -> None:
    if columns % block:
        raise ValueError(f"Rows of {columns} are not whole blocks of {block}.")


def _weights(importance: Tensor, block: int, size: int) -> Tensor:
    """float32 [element, sub-block, block] of importance [n, columns]: up to 1 in each block, and never nothing."""
    weight = _turn(importance.float().reshape(-1, block), size, Scratch())
    return weight.div_(weight.amax((0, 1)).clamp_min_(torch.finfo(torch.float32).tiny)).clamp_min_(LEAST_WEIGHT)


def _lay_out(blocks: Tensor, weight: Tensor, size: int, scratch: Scratch) -> Piece:
    """A piece of blocks [n, block] cut to sub-blocks of `size`."""
    x = _turn(blocks, size, scratch)
    largest = torch.maximum(x.amax((0, 1)), -x.amin((0, 1)))
    exponent = torch.frexp(largest).exponent.clamp_(-126, 126)
    return Piece(x.mul_(power_of_two(-exponent)), weight, exponent, scratch)


def _turn(blocks: Tensor, size: int, scratch: Scratch) -> Tensor:
    """[element, sub-block, n] of blocks [n, block]. Two plain copies are faster than one between both orders."""
    turned = scratch.take(blocks.T).copy_(blocks.T).unflatten(0, (-1, size)).transpose(0, 1)
    return scratch.take(turned).copy_(turned)


def power_of_two(exponent: Tensor) -> Tensor:
    """float32 2^exponent for exponents within -126..127."""
    return ((exponent + 127).to(torch.int32) << 23).view(torch.float32)


def total(terms: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two, half onto half; overwrites the terms."""
    while len(terms) > 2:
        half = len(terms) // 2
        terms = terms[:half].add_(terms[half:])
    return terms[0] + terms[1]


def ratio(numerator: Tensor | float, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where that is no finite number."""
    return (numerator / denominator).nan_to_num_(0.0, 0.0, 0.0)


def turn_back(levels: Tensor) -> Tensor:
    """uint8 [n, sub-block, element] of levels [element, sub-block, n]."""
    return levels.to(torch.uint8).transpose(0, 1).flatten(0, 1).T.contiguous().unflatten(1, (levels.shape[1], -1))


def bytes_of(step: Tensor) -> Tensor:
    """uint8 [blocks, 2] of halves [blocks]."""
    return step.contiguous().view(torch.uint8).unflatten(0, (-1, 2))
