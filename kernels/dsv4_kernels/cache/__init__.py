"""What caches keep: rows of activations in the cache's own float type (spec/checkpoint.md section 3.14)."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape


def keep(rows: Tensor, to: Tensor, *, backend: str | None = None) -> None:
    """Writes rows [t, d] to `to` [t, d], a part of a cache, whose float type may be narrower: rounded to the nearest, ties
    to even. Raises ValueError when the shapes differ."""
    demand_shape("cache rows", to, *rows.shape)
    pick("cache", rows.device.type, backend).module.keep(rows, to)
