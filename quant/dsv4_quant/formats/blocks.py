"""Rows cut into blocks of 256 for the IQ formats' encoders, a few at a time, in ranges that float32 likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 256
SMALLEST = 1e-30  # keeps a division by nothing finite
LARGEST_HALF = 65504.0
_LEAST_WEIGHT = 1e-6  # of the largest in the block: what nobody weighs shall still be approximated
_PIECE = {"cpu": 2**16, "cuda": 2**21}  # weights at a time: bounds the memory


def encode(rows: Tensor, importance: Tensor | None, encode_blocks: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """uint8 [n, row bytes] of float rows [n, columns] by a function of (values, weights) [m, 256] to [m, block bytes]."""
    pieces = [encode_blocks(values, weights) for values, weights in _pieces(rows, importance)]
    return torch.cat(pieces).view(rows.shape[0], -1)


def _pieces(rows: Tensor, importance: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(values, weights) float32 [m, 256] of a few rows at a time."""
    step = max(1, _PIECE[rows.device.type] // rows.shape[-1])
    weights = torch.ones(1, device=rows.device) if importance is None else importance
    weights = weights.expand(rows.shape)
    for first in range(0, rows.shape[0], step):
        part = slice(first, first + step)
        yield rows[part].float().reshape(-1, BLOCK), weights[part].float().reshape(-1, BLOCK)


def unit(values: Tensor) -> Tensor:
    """float32 [m]: the largest magnitude of each block [m, 256], 1 where there is none."""
    largest = values.abs().amax(1)
    return torch.where(largest > 0, largest, 1)


def positive(weights: Tensor) -> Tensor:
    """Weights [m, 256] over the largest of their block, none of them zero."""
    largest = weights.amax(1, keepdim=True)
    return torch.where(largest > 0, weights / largest.clamp_min(SMALLEST), 1).clamp_min(_LEAST_WEIGHT)


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
