"""The search behind Q3_K, Q6_K and IQ4_XS: x is about scale * value, the values few and fixed, the scale an integer of few
bits, with a sign, under a step of its block.

As affine.py without minima: each sub-block by itself, by guesses and then by rounds of nearest values and least squares;
then the block's step, the integers, the values under them, and the step anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.formats.search import Piece, ratio, total

# Replaces numbers, in place, by the nearest of the values.
Nearest = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Effort:
    """How long to search: guesses of which value the largest number becomes, rounds of sub-blocks and of blocks, and
    guesses of the block's step (divisors of the largest scale)."""

    guesses: tuple[float, ...]
    fits: int
    rounds: int
    divisors: tuple[float, ...]


@dataclass
class Choice:
    """What is stored: step [block] and its integers [sub-block, block], values [element, sub-block, block]."""

    step: Tensor
    scales: Tensor
    values: Tensor


@dataclass
class Moments:
    """Weighted sums over a sub-block's values v: of v^2 and of v times the number, [sub-block, block]."""

    vv: Tensor
    vx: Tensor


class Signed:
    """One piece under search; integers of scales lie within -grid..grid - 1."""

    def __init__(self, piece: Piece, nearest: Nearest, grid: int) -> None:
        self.piece, self.nearest, self.grid = piece, nearest, grid
        self.weight = piece.weight
        self.wx = torch.mul(piece.weight, piece.x, out=piece.spare())
        self.values, self._one = piece.spare(), piece.spare()

    def moments(self, inverse: Tensor) -> Moments:
        """Sets the values nearest to the numbers times `inverse`; gives their moments."""
        v = self.nearest(torch.mul(self.piece.x, inverse, out=self.values))
        vv = total(torch.mul(self.weight, v, out=self._one).mul_(v))
        return Moments(vv, total(torch.mul(self.wx, v, out=self._one)))

    def fit(self, effort: Effort) -> Tensor:
        """The scale [sub-block, block] of each sub-block by itself."""
        low, high = self.piece.x.amin(0), self.piece.x.amax(0)
        largest = torch.where(high > -low, high, low)
        scale, best = torch.zeros_like(largest), torch.zeros_like(largest)
        for turn in range(len(effort.guesses) + effort.fits):
            if turn < len(effort.guesses):
                inverse = ratio(effort.guesses[turn], largest)
            else:
                inverse = ratio(1.0, scale)
            m = self.moments(inverse)
            tried = ratio(m.vx, m.vv)
            gain = tried * m.vx
            scale, best = torch.where(gain > best, tried, scale), torch.maximum(gain, best)
        return scale

    def encode(self, effort: Effort) -> Choice:
        """The whole search."""
        scale = self.fit(effort)
        m = self.moments(ratio(1.0, scale))
        step = self._start(m, scale, effort)
        best = torch.full_like(step, torch.inf)
        kept = (step, scale)
        for _ in range(effort.rounds):
            found = (step, self._pick(m, step))
            m = self.moments(ratio(1.0, found[0] * found[1]))
            error = self._error(m, *found)
            better = error < best
            best = torch.where(better, error, best)
            kept = (torch.where(better, found[0], kept[0]), torch.where(better, found[1], kept[1]))
            step = self._refit(m, *found)
        step, scales = kept
        self.moments(ratio(1.0, step * scales))
        return Choice(step, scales, self.values)

    def _error(self, m: Moments, step: Tensor, scales: Tensor) -> Tensor:
        """The weighted squared error [block] less a constant of the block."""
        scale = step * scales
        return total(scale * (scale * m.vv - 2 * m.vx))

    def _start(self, m: Moments, scale: Tensor, effort: Effort) -> Tensor:
        """The step [block] of least error for these values, of several divisors of the largest scale."""
        low, high = scale.amin(0), scale.amax(0)
        largest = torch.where(high > -low, high, low)  # becomes the integer -grid: there is one more of these
        best, kept = torch.full_like(largest, torch.inf), largest
        for divisor in effort.divisors:
            step = self.piece.as_stored(largest / divisor)
            error = self._error(m, step, self._pick(m, step))
            better = error < best
            best, kept = torch.where(better, error, best), torch.where(better, step, kept)
        return kept

    def _pick(self, m: Moments, step: Tensor) -> Tensor:
        """The integer of least error for each sub-block."""
        return ratio(m.vx, m.vv * step).round_().clamp_(-self.grid, self.grid - 1)

    def _refit(self, m: Moments, step: Tensor, scales: Tensor) -> Tensor:
        """The step [block] of least error for these values and integers, as it is stored."""
        divisor = total(scales * scales * m.vv)
        return torch.where(divisor > 0, self.piece.as_stored(ratio(total(scales * m.vx), divisor)), step)


def whole(half: int) -> Nearest:
    """Nearest of the integers -half..half - 1."""
    return lambda numbers: numbers.round_().clamp_(-half, half - 1)
