"""The search behind Q2_K, Q4_K and Q5_K: x is about scale * level - minimum, both of few bits under steps of their block.

First each sub-block by itself: levels by several guesses of the scale, for each the weighted least squares fit in closed
form, then rounds of new levels and new fit. Then the block's two steps: sub-block scales and minima are picked among the
neighbours on the grid, levels follow, the steps are fitted anew. Whatever had the least error is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.formats.search import Piece, ratio, total


@dataclass(frozen=True)
class Effort:
    """How long to search: guesses of the scale, rounds of sub-blocks and of blocks, and guesses of the block's steps
    (divisors of the largest scale).

    A guess (more, inset) spreads the range, less its inset at both ends (a part of it), over `more` levels than there are.
    """

    guesses: tuple[tuple[float, float], ...]
    fits: int
    rounds: int
    divisors: tuple[float, ...]


@dataclass
class Choice:
    """What is stored: steps and their integers [sub-block, block], levels [element, sub-block, block]."""

    step: Tensor
    step_min: Tensor
    scales: Tensor
    minima: Tensor
    levels: Tensor


@dataclass
class Moments:
    """Weighted sums over a sub-block's levels q: of q, q^2 and q times the number, [sub-block, block]."""

    q: Tensor
    qq: Tensor
    qx: Tensor


class Affine:
    """One piece under search. Numbers are kept as heights above their sub-block's floor: small differences stay exact."""

    def __init__(self, piece: Piece, top: int, grid: int) -> None:
        self.piece, self.top, self.grid = piece, top, grid
        self.floor = piece.x.amin(0).clamp_(max=0)  # a minimum below zero or none: it is stored without a sign
        self.height = piece.x.sub_(self.floor)
        self.reach = self.height.amax(0)
        self.weight = piece.weight
        self.wx = torch.mul(self.weight, self.height, out=piece.spare())
        self.levels, self._one, self._two = (piece.spare() for _ in range(3))
        self.sum_w = total(self._one.copy_(self.weight))
        self.sum_wx = total(self._one.copy_(self.wx))

    def level(self, scale: Tensor, shift: Tensor) -> Moments:
        """Sets the levels nearest to (height - shift) / scale; gives their moments."""
        q = torch.sub(self.height, shift, out=self.levels).mul_(ratio(1.0, scale))
        q.round_().clamp_(0, self.top)
        wq = torch.mul(self.weight, q, out=self._one)
        qq = total(torch.mul(wq, q, out=self._two))
        return Moments(total(wq), qq, total(torch.mul(self.wx, q, out=self._two)))

    def error(self, m: Moments, scale: Tensor, shift: Tensor) -> Tensor:
        """The weighted squared error less a constant of the sub-block."""
        return scale * (scale * m.qq - 2 * (m.qx - shift * m.q)) + shift * (shift * self.sum_w - 2 * self.sum_wx)

    def solve(self, m: Moments) -> tuple[Tensor, Tensor]:
        """(scale, shift) of least error for given levels; the minimum stays below zero."""
        spread = self.sum_w * m.qq - m.q * m.q
        spread = torch.where(spread > 1e-6 * self.sum_w * m.qq, spread, 0.0)  # all levels alike: nothing to tell apart
        shift = ratio(m.qq * self.sum_wx - m.q * m.qx, spread)
        shift = torch.where(m.qq > 0, shift, self.sum_wx / self.sum_w)
        shift = torch.minimum(shift, -self.floor)
        return ratio(m.qx - shift * m.q, m.qq), shift

    def fit(self, effort: Effort) -> tuple[Tensor, Tensor]:
        """(scale, shift) [sub-block, block] of each sub-block by itself."""
        shift = torch.minimum(self.sum_wx / self.sum_w, -self.floor)
        scale = torch.zeros_like(shift)
        best = shift * (shift * self.sum_w - 2 * self.sum_wx)
        for turn in range(len(effort.guesses) + effort.fits):
            if turn < len(effort.guesses):
                more, inset = effort.guesses[turn]
                moments = self.level(self.reach * ((1 - 2 * inset) / (self.top + more)), self.reach * inset)
            else:
                moments = self.level(scale, shift)
            tried = self.solve(moments)
            error = self.error(moments, *tried)
            better = (error < best) & (tried[0] > 0)
            best = torch.where(better, error, best)
            scale, shift = torch.where(better, tried[0], scale), torch.where(better, tried[1], shift)
        return scale, shift

    def encode(self, effort: Effort) -> Choice:
        """The whole search."""
        scale, shift = self.fit(effort)
        moments = self.level(scale, shift)
        step, step_min = self._start(moments, scale, -(self.floor + shift), effort)
        best = torch.full_like(step, torch.inf)
        kept: tuple[Tensor, ...] = ()
        for _ in range(effort.rounds):
            scales, minima = self._pick(moments, step, step_min)
            moments = self.level(scales * step, -self.floor - minima * step_min)
            error = total(self.error(moments, scales * step, -self.floor - minima * step_min))
            better = error < best
            best = torch.where(better, error, best)
            found = (step, step_min, scales, minima)
            kept = tuple(torch.where(better, new, old) for new, old in zip(found, kept or found, strict=True))
            step, step_min = self._refit(moments, *found)
        step, step_min, scales, minima = kept
        self.level(scales * step, -self.floor - minima * step_min)
        return Choice(step, step_min, scales, minima, self.levels)

    def _start(self, m: Moments, scale: Tensor, minimum: Tensor, effort: Effort) -> tuple[Tensor, Tensor]:
        """Steps (of scales, of minima) [block] of least error for these levels: one after the other, of several divisors
        of the largest."""
        largest, largest_min = scale.amax(0), minimum.amax(0)
        step = self.piece.as_stored(largest / effort.divisors[0])
        step_min = self.piece.as_stored(largest_min / effort.divisors[0])
        best = self._error_on_grid(m, step, step_min)
        for divisor in effort.divisors[1:]:
            tried = self.piece.as_stored(largest / divisor)
            error = self._error_on_grid(m, tried, step_min)
            step, best = torch.where(error < best, tried, step), torch.minimum(error, best)
        for divisor in effort.divisors[1:]:
            tried = self.piece.as_stored(largest_min / divisor)
            error = self._error_on_grid(m, step, tried)
            step_min, best = torch.where(error < best, tried, step_min), torch.minimum(error, best)
        return step, step_min

    def _error_on_grid(self, m: Moments, step: Tensor, step_min: Tensor) -> Tensor:
        """The error [block] of these levels with the best integers under these steps, less a constant."""
        scales, minima = self._pick(m, step, step_min)
        return total(self.error(m, scales * step, -self.floor - minima * step_min))

    def _pick(self, m: Moments, step: Tensor, step_min: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (of scales, of minima) on the grid of these steps: both neighbours of the best scale, the best
        minimum for each."""
        lower = ratio(self.solve(m)[0], step).floor_()
        best, kept = torch.full_like(lower, torch.inf), (lower, lower)
        for scales in (lower.clamp(0, self.grid), (lower + 1).clamp_(0, self.grid)):
            scale = scales * step
            minimum = -self.floor - (self.sum_wx - scale * m.q) / self.sum_w
            minima = ratio(minimum, step_min).round_().clamp_(0, self.grid)
            error = self.error(m, scale, -self.floor - minima * step_min)
            better = error < best
            best = torch.where(better, error, best)
            kept = (torch.where(better, scales, kept[0]), torch.where(better, minima, kept[1]))
        return kept

    def _refit(self, m: Moments, step: Tensor, step_min: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor]:
        """Steps [block] of least error for these levels and integers, as they are stored; as before where there is no
        better."""
        a, b = total(scales * scales * m.qq), total(scales * minima * m.q)
        c = total(minima * minima * self.sum_w)
        e = total(scales * (m.qx + self.floor * m.q))
        f = -total(minima * (self.floor * self.sum_w + self.sum_wx))
        spread = a * c - b * b
        both = spread > 1e-6 * a * c
        new = torch.where(both, ratio(e * c + f * b, spread), ratio(e + b * step_min, a))
        new_min = torch.where(both, ratio(f * a + e * b, spread), step_min)
        good = (new > 0) & (new_min >= 0)
        stored = self.piece.as_stored
        return torch.where(good, stored(new), step), torch.where(good, stored(new_min), step_min)
