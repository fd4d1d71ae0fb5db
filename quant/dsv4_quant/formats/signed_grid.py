"""What IQ2_XXS, IQ2_XS and IQ3_XXS have in common: magnitudes from a grid, signs of even parity, odd multiples of a step.

A block of 256 has an F16 d; a part of it (16 or 32 elements) a four-bit s. With the step u = d / `divisor` a weight is
u (2 s + 1) times a magnitude of the grid times its sign. Eight signs are stored as seven bits: the number of minus signs
among eight is even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv4_quant.formats import blocks
from dsv4_quant.formats.blocks import BLOCK, SMALLEST, fold
from dsv4_quant.formats.nearest import Grid, Vectors
from dsv4_quant.formats.search import LARGEST_HALF

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
    eights = _signs_on(signs.device).index_select(0, signs.flatten()).unflatten(0, signs.shape)
    values = eights.mul_(sizes.view(eights.shape))
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


@cache
def _signs_on(device: torch.device) -> Tensor:
    """float32 [128, 8]: 1 or -1 of seven-bit signs; the eighth makes the number of -1 even."""
    bits = torch.arange(128)[:, None] >> torch.arange(7) & 1
    return (1.0 - 2.0 * torch.cat([bits, bits.sum(1, keepdim=True) % 2], 1)).to(device)


def encode(rows: Tensor, importance: Tensor | None, layout: Layout, block_bytes: int,
           pack: Callable[[Coded], Tensor]) -> Tensor:
    """uint8 [n, row bytes] of float rows [n, columns]; `pack` makes the bytes [m, block_bytes] of m blocks."""
    return blocks.encode(rows, importance, block_bytes, lambda values, weights: pack(_code(values, weights, layout)))


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
    odd = minus
    while odd.shape[0] > 1:
        odd = odd[: odd.shape[0] // 2] ^ odd[odd.shape[0] // 2 :]
    _, cheapest = blocks.lowest(weights * sizes)
    places = torch.arange(8, dtype=torch.int32, device=values.device).view(8, 1, 1)
    turned = (places == cheapest) & odd
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
        free, _ = self._best([self._magnitude * start for start in self._layout.starts])
        free = free.view(len(self._unit), -1)
        _, u = self._stored(free.amax(1) / TOP)
        s = ((free / u[:, None] - 1) / 2).round_()
        near = [((s + move).clamp_(0, 15) * 2 + 1) * u[:, None] for move in (0, -1, 1)]
        scale, points = self._best([one.flatten() for one in near])
        multiple = (scale.view(s.shape) / u[:, None]).round_()
        d, _ = self._stored(self._refit(multiple, points))
        return d, multiple.long() >> 1, points

    def _best(self, scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(scale [parts], points [groups, parts]): of scales [parts] the one that suits each part best."""
        found = [self._layout.grid.nearest(self._vectors, scale) for scale in scales]
        best = torch.stack([fold(cost) for cost, _ in found]).argmin(0, keepdim=True)
        points = torch.stack([points for _, points in found])
        chosen = points.gather(0, best[:, None].expand(1, *points.shape[1:]))
        return torch.stack(scales).gather(0, best)[0], chosen[0]

    def _stored(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(d, the step that it means): float16 [m] and float32 [m] in units of the block."""
        d = (u * self._layout.divisor * self._unit).clamp_max(LARGEST_HALF).half()
        return d, (d.float() / self._layout.divisor / self._unit).clamp_min(SMALLEST)

    def _refit(self, multiple: Tensor, points: Tensor) -> Tensor:
        """float32 [m]: the step of least squares, multiples of it [m, parts] and points given."""
        values = self._layout.grid.values(points)
        each = multiple.flatten()
        dot = fold(fold(self._vectors.wx * values)) * each
        norm = fold(fold(self._vectors.w * values * values)) * (each * each)
        return blocks.quotient(dot.view(multiple.shape), norm.view(multiple.shape))
