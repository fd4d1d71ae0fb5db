"""What IQ2_XXS, IQ2_XS and IQ3_XXS have in common: magnitudes from a grid, signs of even parity, odd multiples of a step.

A block of 256 has an F16 d; a part of it (16 or 32 elements) a four-bit s. With the step u = d / `divisor` a weight is
u (2 s + 1) times a magnitude of the grid times its sign. Eight signs are stored as seven bits: the number of minus signs
among eight is even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.formats import blocks
from dsv4_quant.formats.blocks import BLOCK, LARGEST_HALF, SMALLEST, fold
from dsv4_quant.formats.nearest import Grid, Vectors

TOP = 31  # the largest odd multiple that four bits make


@dataclass(frozen=True)
class Layout:
    """A member of the family: grid, elements of a part, d over the step, scales to try first (of a part's magnitude)."""

    grid: Grid
    part: int
    divisor: int
    starts: tuple[float, ...]


@dataclass(frozen=True)
class Coded:
    """Blocks in numbers: d float16 [n], s int64 [n, parts], points [n, parts, groups], signs int64 [n, parts, eights]."""

    step: Tensor
    scales: Tensor
    points: Tensor
    signs: Tensor


def three_levels(magnitudes: Tensor) -> Grid:
    """The grid of magnitudes 8, 25 and 43; a feature says 25, another 43."""
    codes = (magnitudes > 8).long() + (magnitudes > 25).long()
    return Grid(codes, (8, 25, 43), ((0, 1, 0), (0, 0, 1)), (25 - 8, 43 - 8), (25**2 - 8**2, 43**2 - 8**2))


def decode(steps: Tensor, points: Tensor, signs: Tensor, grid: Grid) -> Tensor:
    """float32 [..., columns] of steps [..., blocks, parts], points [..., blocks, parts, groups] and seven-bit signs."""
    sizes = grid.rows(points).flatten(-2)  # [..., blocks, parts, elements of a part]
    values = sizes.unflatten(-1, (-1, 8)) * _signs_of(signs)
    return values.mul_(steps[..., None, None]).flatten(-4)


def pack(coded: Coded) -> Tensor:
    """uint8 [m, parts, 4]: four times seven sign bits, then s."""
    return bytes_of(_joined(coded.signs, 7) | coded.scales << 28, 4)


def unpack(words: Tensor) -> tuple[Tensor, Tensor]:
    """(s, signs [..., 4]) int64 of bytes [..., 4]."""
    word = _joined(words.long(), 8)
    shifts = torch.arange(0, 28, 7, device=words.device)
    return word >> 28, word[..., None] >> shifts & 127


def _joined(fields: Tensor, bits: int) -> Tensor:
    """int64 [...] of fields [..., n], the first one lowest."""
    return (fields << torch.arange(0, fields.shape[-1] * bits, bits, device=fields.device)).sum(-1)


def bytes_of(words: Tensor, count: int) -> Tensor:
    """uint8 [..., count] of int64 words, the lowest byte first."""
    return (words[..., None] >> torch.arange(0, 8 * count, 8, device=words.device) & 255).to(torch.uint8)


def _signs_of(signs: Tensor) -> Tensor:
    """float32 [..., 8], 1 or -1, of seven-bit signs [...]."""
    bits = signs[..., None] >> torch.arange(7, device=signs.device) & 1
    bits = torch.cat([bits, bits.sum(-1, keepdim=True) & 1], -1)
    return 1.0 - 2.0 * bits


def encode(rows: Tensor, importance: Tensor | None, layout: Layout, pack: Callable[[Coded], Tensor]) -> Tensor:
    """uint8 [n, row bytes] of float rows [n, columns]; `pack` makes the bytes [m, block bytes] of m blocks."""
    return blocks.encode(rows, importance, lambda values, weights: pack(_code(values, weights, layout)))


def _code(values: Tensor, weights: Tensor, layout: Layout) -> Coded:
    """Finds d, s, points and signs of blocks [m, 256]."""
    unit = blocks.unit(values)
    eights = blocks.eights(values / unit[:, None], layout.part)
    weights = blocks.eights(blocks.positive(weights), layout.part)
    minus, sizes = _signs(eights, weights)
    d, s, points = _Search(layout, sizes, weights, unit).run()
    parts = BLOCK // layout.part
    signs = _seven_bits(minus).t()
    return Coded(d, s, points.t().unflatten(0, (-1, parts)), signs.unflatten(0, (-1, parts)))


def _groups(eights: Tensor, elements: int) -> Tensor:
    """[elements, groups, parts] of [8, eights, parts]."""
    halves = eights.view(8 // elements, elements, *eights.shape[1:])
    return halves.permute(1, 2, 0, 3).reshape(elements, -1, eights.shape[-1])


def _signs(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(minus, values under these signs) [8, ...]: where signs are odd, the one that costs least to get wrong is turned."""
    minus = values < 0
    sizes = values.abs()
    odd = minus.sum(0, keepdim=True) % 2 == 1
    cheapest = (weights * sizes).argmin(0, keepdim=True)
    turned = torch.zeros_like(minus).scatter_(0, cheapest, odd)
    return minus ^ turned, torch.where(turned, -sizes, sizes)


def _seven_bits(minus: Tensor) -> Tensor:
    """int64 [...] of bool [8, ...]; the eighth follows from the others."""
    bits = torch.zeros(minus.shape[1:], dtype=torch.int64, device=minus.device)
    for i in range(7):
        bits |= minus[i].long() << i
    return bits


class _Search:
    """The search for d and s of blocks whose parts are `sizes` and `weights` [8, eights, parts], in units of `unit` [m]."""

    def __init__(self, layout: Layout, sizes: Tensor, weights: Tensor, unit: Tensor) -> None:
        elements = layout.grid.elements
        self._layout, self._unit = layout, unit
        self._vectors = Vectors.of(_groups(sizes, elements), _groups(weights, elements))
        self._magnitude = blocks.fourth_root_mean(sizes, weights)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(d float16 [m], s int64 [m, parts], points [groups, parts of all blocks])."""
        free = self._free_scales()
        d, u = self._stored(free.amax(1) / TOP)
        s = ((free / u[:, None] - 1) / 2).round_().clamp_(0, 15)
        s, points = self._best_near(s, u)
        d, u = self._stored(self._refit(s, points))
        s, points = self._best_near(s, u, (0,))
        return d, s.long(), points

    def _free_scales(self) -> Tensor:
        """float32 [m, parts]: of the starts, the scale that suits each part best, as if scales were stored as floats."""
        scales = torch.stack([self._magnitude * start for start in self._layout.starts])
        costs = torch.stack([fold(self._layout.grid.nearest(self._vectors, scale)[0]) for scale in scales])
        best = costs.argmin(0, keepdim=True)
        return scales.gather(0, best).view(len(self._unit), -1)

    def _stored(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(d, the step that it means): float16 [m] and float32 [m] in units of the block."""
        d = (u * self._layout.divisor * self._unit).clamp_max(LARGEST_HALF).half()
        return d, d.float() / self._layout.divisor / self._unit

    def _best_near(self, s: Tensor, u: Tensor, near: tuple[int, ...] = (0, -1, 1)) -> tuple[Tensor, Tensor]:
        """(s, points): for each part the best of its s and the neighbours."""
        best_cost, best_s, best_points = torch.empty(0), torch.empty(0), torch.empty(0)
        for i, move in enumerate(near):
            moved = (s + move).clamp_(0, 15)
            cost, points = self._layout.grid.nearest(self._vectors, ((2 * moved + 1) * u[:, None]).flatten())
            cost = fold(cost)
            if i == 0:
                best_cost, best_s, best_points = cost, moved, points
                continue
            better = cost < best_cost
            best_cost = torch.where(better, cost, best_cost)
            best_s = torch.where(better.view(s.shape), moved, best_s)
            best_points = torch.where(better, points, best_points)
        return best_s, best_points

    def _refit(self, s: Tensor, points: Tensor) -> Tensor:
        """float32 [m]: the step of least squares, s and points given."""
        values = self._layout.grid.values(points)
        multiple = (2 * s + 1).flatten()
        dot = fold(fold(self._vectors.wx * values)) * multiple
        norm = fold(fold(self._vectors.w * values * values)) * (multiple * multiple)
        return (fold(dot.view(s.shape).t()) / fold(norm.view(s.shape).t()).clamp_min(SMALLEST)).clamp_min(0)
