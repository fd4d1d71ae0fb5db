"""The weighted nearest grid point of many small vectors at once: one matrix product and one minimum.

The cost of a grid point is a sum over elements, and an element's cost is linear in a few whole-numbered features of its
level. So a product of [vectors, features] with [features, points] holds the cost of every pair. Coefficients are rounded
to whole numbers small enough that float32 adds them exactly, whatever the order, and a last feature adds the number of
the point, so that the minimum alone (fast) says which point it was (argmin is slow). On a GPU this needs products in
full float32, torch's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_quant.formats.blocks import SMALLEST, fold

EXACT = 2**24  # float32 holds every whole number up to here
_CHUNK, _GPU_CHUNK = 2**19, 2**24  # costs at a time: what stays in a cache, or fills a GPU


@dataclass(frozen=True)
class Vectors:
    """What is to be approximated: weights w and products w x, float32 [elements, ...], and their sums over elements."""

    w: Tensor
    wx: Tensor
    sum_w: Tensor
    sum_wx: Tensor
    sum_abs: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Vectors:
        """Of values and weights [elements, ...]."""
        wx = values * weights
        return cls(weights, wx, fold(weights), fold(wx), fold(wx.abs()))


class Grid:
    """`codes` [points, elements] choose among `levels`; points and elements are powers of two.

    `features` [f, levels] are small whole numbers, all 0 for level 0, of which the levels' differences from level 0 are
    combinations: `linear` [f] for the level itself, `square` [f] for its square.
    """

    def __init__(
        self, codes: Tensor, levels: Sequence[float], features: Sequence[Sequence[int]],
        linear: Sequence[float], square: Sequence[float],
    ) -> None:  # fmt: skip
        self.points, self.elements = codes.shape
        self.base = float(levels[0])
        self._linear, self._square = linear, square
        table = torch.tensor(features, dtype=torch.float32)
        largest = table.abs().amax(1)
        self._linear_bound = float((largest * torch.tensor(linear).abs()).sum())
        self._square_bound = float((largest * torch.tensor(square).abs()).sum())
        self._room = EXACT // self.points - 2 - float(largest.sum()) * self.elements / 2
        chosen = table[:, codes.long()].transpose(1, 2).reshape(-1, self.points) * self.points
        products = torch.cat([chosen, torch.arange(self.points, dtype=torch.float32)[None]])
        values = torch.tensor(levels, dtype=torch.float32)[codes.long()]
        self._tables = {torch.device("cpu"): (products, values.t().contiguous(), values)}

    def nearest(self, vectors: Vectors, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(cost, point), float32 and int64 [...], of the point p with the least sum of w (x - scale p)^2.

        Costs lack the sum of w x^2, which is the same for every point. `scale` is float32, broadcast to [...].
        """
        linear, square = scale * 2, scale * scale
        bound = vectors.sum_w * (square * self._square_bound) + vectors.sum_abs * (linear * self._linear_bound)
        unit = self._room / bound.clamp_min(SMALLEST)
        packed = self._search(vectors, unit * linear, unit * square)
        whole = torch.floor(packed / self.points)
        point = (packed - whole * self.points).long()
        rest = vectors.sum_w * (square * self.base**2) - vectors.sum_wx * (linear * self.base)
        return whole / unit + rest, point

    def _search(self, vectors: Vectors, linear: Tensor, square: Tensor) -> Tensor:
        """float32 [...]: cost in whole units times the number of points, plus the point."""
        w, wx = vectors.w * square, vectors.wx * linear
        columns = torch.empty(len(self._linear) * self.elements + 1, *w.shape[1:], device=w.device)
        for i, (a, b) in enumerate(zip(self._square, self._linear, strict=True)):
            part = columns[i * self.elements : (i + 1) * self.elements]
            torch.mul(w, a, out=part).sub_(wx * b)
        columns.round_()[-1] = 1
        return self._minimum(columns.flatten(1)).view(w.shape[1:])

    def _minimum(self, columns: Tensor) -> Tensor:
        products = self._on(columns.device)[0]
        size = (_CHUNK if columns.is_cpu else _GPU_CHUNK) // self.points
        count = columns.shape[1]
        best = torch.empty(count, device=columns.device)
        costs = torch.empty(min(size, count), self.points, device=columns.device)
        for first in range(0, count, size):
            chunk = columns[:, first : first + size].t()
            out = costs[: len(chunk)]
            torch.mm(chunk, products, out=out)
            torch.amin(out, 1, out=best[first : first + size])
        return best

    def values(self, points: Tensor) -> Tensor:
        """float32 [elements, ...] of points [...]."""
        return self._on(points.device)[1].index_select(1, points.flatten()).unflatten(1, points.shape)

    def rows(self, points: Tensor) -> Tensor:
        """float32 [..., elements] of points [...]."""
        return self._on(points.device)[2].index_select(0, points.flatten().int()).unflatten(0, points.shape)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where they are needed: products [features, points], values [elements, points] and [points, elements]."""
        if device not in self._tables:
            first, second, third = self._tables[torch.device("cpu")]
            self._tables[device] = first.to(device), second.to(device), third.to(device)
        return self._tables[device]
