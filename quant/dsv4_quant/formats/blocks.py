"""Rows cut into blocks of 256 for the IQ formats' encoders, in ranges that float32 likes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_quant.formats.search import LEAST_WEIGHT, by_pieces, importance_for

BLOCK = 256
SMALLEST = 1e-15  # of the largest in a block: keeps divisions by nothing finite, and their squares


def encode(rows: Tensor, importance: Tensor | None, block_bytes: int,
           encode_blocks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """uint8 [n, row bytes] of float rows [n, columns] by a function of (values, weights) [m, 256] to [m, block_bytes].

    `importance` [columns] or [n, columns] says how much an error matters. Raises ValueError for another shape of it, and for
    rows of no whole blocks.
    """
    weights = importance_for(rows, importance, BLOCK).expand(rows.shape)

    def weighed(blocks: Tensor, row: int) -> Tensor:
        count = blocks.numel() // rows.shape[1]
        return encode_blocks(blocks, weights[row : row + count].float().reshape(-1, BLOCK))

    return by_pieces(rows, BLOCK, block_bytes, weighed, light=True)


def unit(values: Tensor) -> Tensor:
    """float32 [m]: the largest magnitude of each block [m, 256], 1 where there is none."""
    largest = values.abs().amax(1)
    return torch.where(largest > 0, largest, 1)


def positive(weights: Tensor) -> Tensor:
    """Weights [m, 256] over the largest of their block, none of them zero."""
    return (weights / unit(weights)[:, None]).clamp_min(LEAST_WEIGHT)


def eights(blocks: Tensor, part: int) -> Tensor:
    """[8, eights of a part, parts of all blocks] of blocks [m, 256]: what lies side by side is computed alike."""
    return blocks.view(-1, part // 8, 8).permute(2, 1, 0).contiguous()


def fold(values: Tensor) -> Tensor:
    """The sum over the first dimension, a power of two, by halves: the same bits wherever a column lies."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = values[:half] + values[half:]
    return values[0]


def fourth_root_mean(values: Tensor, weights: Tensor) -> Tensor:
    """float32 [parts] of [8, eights, parts]: the weighted mean of fourth powers, as a magnitude. Good scales follow it."""
    squares = values * values
    return (fold(fold(weights * squares * squares)) / fold(fold(weights))).sqrt().sqrt()


def quotient(dot: Tensor, norm: Tensor) -> Tensor:
    """float32 [m] >= 0: the step of least squares, of dot and norm [m, parts] of what it multiplies."""
    return (fold(dot.t()) / fold(norm.t()).clamp_min(SMALLEST)).clamp_min(0)


def lowest(costs: Tensor) -> tuple[Tensor, Tensor]:
    """(least, its index int32) over the first dimension, short, of float32 costs >= 0, which are overwritten.

    The index takes the place of the last bits (argmin is slow). So costs that differ by less may change places.
    """
    bits = (costs.shape[0] - 1).bit_length()
    index = torch.arange(costs.shape[0], dtype=torch.int32, device=costs.device)
    packed = costs.view(torch.int32).bitwise_and_(-1 << bits)  # floats >= 0 are in the order of their bits
    least = packed.bitwise_or_(index.view(-1, *[1] * (costs.dim() - 1))).amin(0)
    return least.view(torch.float32), least & (1 << bits) - 1
