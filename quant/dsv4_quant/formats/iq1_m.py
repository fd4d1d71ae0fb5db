"""IQ1_M: 56 bytes for 256 elements: a grid point for each 8, three-bit scales s for each 16, and d in the gaps.

A weight is d (2 s + 1) times -1, 0 or 1, shifted for eight elements together by 1/8 up or down. First come the low bytes
of the 32 points; then 16 bytes, a nibble a group, the first one low: the three high bits of the point, and a bit that says
"down"; then four little-endian words of four s each, lowest first, and four bits of the F16 d on top, its lowest first.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dsv4_quant.formats import blocks, grids
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.blocks import BLOCK, SMALLEST, fold
from dsv4_quant.formats.search import LARGEST_HALF

BLOCK_BYTES = 56
PART = 16
SHIFT = 0.125
_TOP = 15  # the largest odd multiple that three bits make
_PATTERNS = 3**8
_CANDIDATES = 16  # grid points that are tried for a pattern of -1, 0, 1 which need not be in the grid
_STARTS = (0.75, 0.88, 1.0, 1.15, 1.35)  # scales to try first, of a part's magnitude


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 256 * 56]."""
    parts = rows.unflatten(-1, (-1, BLOCK_BYTES))
    words = parts[..., 48::2].int() | parts[..., 49::2].int() << 8  # [..., blocks, 4]
    fours = torch.arange(0, 16, 4, device=rows.device, dtype=torch.int32)
    d = ((words >> 12) << fours).sum(-1, dtype=torch.int16).view(torch.float16).float()
    s = (words[..., None] >> torch.arange(0, 12, 3, device=rows.device) & 7).flatten(-2)
    nibbles = torch.stack([parts[..., 32:48] & 15, parts[..., 32:48] >> 4], -1).flatten(-2).int()  # [..., blocks, 32]
    points = parts[..., :32].int() | (nibbles & 7) << 8
    values = _grid(rows.device).index_select(0, points.flatten()).unflatten(0, points.shape)
    shifted = values + torch.where(nibbles < 8, SHIFT, -SHIFT)[..., None]
    steps = (d[..., None] * (2 * s + 1)).repeat_interleave(2, -1)
    return shifted.mul_(steps[..., None]).flatten(-3)


def encode(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """uint8 [n, columns / 256 * 56] of float rows [n, columns]; importance [columns] or [n, columns] weighs errors."""
    return blocks.encode(rows, importance, BLOCK_BYTES, lambda values, weights: _Search(values, weights).run())


@cache
def _grid(device: torch.device) -> Tensor:
    """float32 [2048, 8]."""
    return grids.iq1_m().float().to(device)


@cache
def _neighbours(device: torch.device) -> tuple[Tensor, Tensor]:
    """(points int64 [candidates, patterns], their values float32 [candidates, 8, patterns]), the nearest ones first.

    Pattern sum of 3^j (v_j + 1) has the values v.
    """
    grid = _grid(torch.device("cpu"))
    patterns = torch.arange(_PATTERNS)[:, None] // 3 ** torch.arange(8) % 3 - 1.0
    points = torch.cat([_nearest_points(some, grid) for some in patterns.split(3**6)]).t().contiguous()
    values = grid[points].transpose(1, 2).contiguous()
    return points.to(device), values.to(device)


def _nearest_points(patterns: Tensor, grid: Tensor) -> Tensor:
    """int64 [n, candidates] of patterns [n, 8], the nearest first; of equally near ones the first."""
    distance = (patterns * patterns).sum(1, keepdim=True) - 2 * patterns @ grid.t() + (grid * grid).sum(1)
    ranked = distance * len(grid) + torch.arange(len(grid))
    return ranked.topk(_CANDIDATES, 1, largest=False).indices


class _Search:
    """The search for d, s, shifts and points of blocks [m, 256].

    Everything lies as [elements, groups of a part, parts of all blocks] = [8, 2, 16 m], in units of the blocks' largest.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self._unit = blocks.unit(values)
        self._x = blocks.eights(values / self._unit[:, None], PART)
        self._w = blocks.eights(blocks.positive(weights), PART)

    def run(self) -> Tensor:
        """uint8 [m, 56]."""
        magnitude = blocks.fourth_root_mean(self._x, self._w)
        starts = torch.stack([(magnitude * start).clamp_min(SMALLEST) for start in _STARTS])
        free = self._best_scale(starts).view(len(self._unit), -1)
        _, u = self._stored(free.amax(1) / _TOP)
        s = ((free / u[:, None] - 1) / 2).round_()
        near = torch.stack([(s + move).clamp_(0, 7) * 2 + 1 for move in (0, -1, 1)])
        scale = self._best_scale((near * u[:, None]).flatten(1))
        shift, point, values = self._nearest(scale)
        multiple = (scale.view(s.shape) / u[:, None]).round()
        d, _ = self._stored(self._refit(multiple, shift, values))
        return _pack(d, multiple.long() >> 1, shift < 0, point)

    def _best_scale(self, scales: Tensor) -> Tensor:
        """float32 [parts]: of scales [n, parts] the one that suits each part best, were every pattern in the grid."""
        costs = torch.stack([fold(torch.minimum(self._rounded(t, SHIFT), self._rounded(t, -SHIFT))) for t in scales])
        _, best = blocks.lowest(costs)
        return scales.gather(0, best[None].long())[0]

    def _rounded(self, scale: Tensor, shift: float) -> Tensor:
        """float32 [groups, parts]: the cost of each group's best values -1, 0, 1 at a shift."""
        y = (self._x * (1 / scale)).sub_(shift)
        rest = y.round().clamp_(-1, 1).sub_(y)
        return fold(rest.mul_(rest).mul_(self._w)) * (scale * scale)

    def _stored(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(d, the step that it means): float16 [m] and float32 [m] in units of the block."""
        d = (u * self._unit).clamp_max(LARGEST_HALF).half()
        return d, (d.float() / self._unit).clamp_min(SMALLEST)

    def _nearest(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(shift, point [groups, parts], values [8, groups, parts]) that suit each group best at scales [parts]."""
        (up_cost, up), (down_cost, down) = (self._candidate(scale, shift) for shift in (SHIFT, -SHIFT))
        is_up = up_cost <= down_cost
        point = torch.where(is_up, up, down)
        values = _grid(point.device).t().index_select(1, point.flatten())
        return torch.where(is_up, SHIFT, -SHIFT), point, values.view(self._x.shape)

    def _candidate(self, scale: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        """(cost, point) [groups, parts] of the best of the grid points around the rounded values."""
        y = (self._x * (1 / scale)).sub_(shift)
        pattern = self._pattern(y.round().clamp_(-1, 1)).flatten()
        points, values = _neighbours(y.device)
        costs = torch.empty(len(values), *y.shape[1:], device=y.device)
        for cost, table in zip(costs, values, strict=True):
            rest = table.index_select(1, pattern).view(y.shape).sub_(y)
            cost.copy_(fold(rest.mul_(rest).mul_(self._w)))
        least, rank = blocks.lowest(costs)
        index = rank.flatten() * _PATTERNS + pattern
        return least, points.flatten().index_select(0, index).view(least.shape)

    def _pattern(self, values: Tensor) -> Tensor:
        """int32 [groups, parts] of values -1, 0, 1 [8, groups, parts]."""
        powers = 3.0 ** torch.arange(8, device=values.device)
        return ((powers @ values.flatten(1)).view(values.shape[1:]) + _PATTERNS // 2).int()

    def _refit(self, multiple: Tensor, shift: Tensor, values: Tensor) -> Tensor:
        """float32 [m]: the step of least squares, all else given."""
        each = multiple.flatten()
        values = values + shift
        weighted = self._w * values
        dot = fold(fold(weighted * self._x)) * each
        norm = fold(fold(weighted * values)) * (each * each)
        return blocks.quotient(dot.view(multiple.shape), norm.view(multiple.shape))


def _pack(d: Tensor, s: Tensor, down: Tensor, point: Tensor) -> Tensor:
    """uint8 [m, 56] of d float16 [m], s int64 [m, 16], shifts and points [2, 16 m]."""
    groups = point.t().reshape(-1, 32)
    nibbles = groups >> 8 | down.t().reshape(-1, 32).long() << 3
    high = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    threes = torch.arange(0, 12, 3, device=d.device)
    words = (s.view(-1, 4, 4) << threes).sum(-1)
    bits = d.view(torch.int16).long()[:, None] >> torch.arange(0, 16, 4, device=d.device) & 15
    words = words | bits << 12
    parts = torch.stack([words & 255, words >> 8], -1).flatten(1)
    return torch.cat([(groups & 255).to(torch.uint8), high.to(torch.uint8), parts.to(torch.uint8)], 1)


FORMAT = Format("iq1_m", BLOCK, BLOCK_BYTES, decode, encode=encode)
