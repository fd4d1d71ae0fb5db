"""What caches keep: rows of activations in the cache's own float type (spec/checkpoint.md section 3.14)."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, uint8

from dsv4_kernels.backends import pick
from dsv4_kernels.cache.packed import index_bytes, kv_bytes
from dsv4_kernels.checks import demand_multiple, demand_shape
from dsv4_kernels.rounding import INDEX_BLOCK, KV_BLOCK

Rounding = Literal["none", "kv", "index"]  # what official numerics do to K=V, to index keys, and plain ones to both

ROUNDINGS = get_args(Rounding)


def keep(rows: Tensor, to: Tensor, *, backend: str | None = None) -> None:
    """Writes rows [t, d] to `to` [t, d], a part of a cache, whose float type may be narrower: rounded to the nearest, ties
    to even. Raises ValueError when the shapes differ."""
    demand_shape("cache rows", to, *rows.shape)
    pick("cache", rows.device.type, backend).module.keep(rows, to)


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor, row: Tensor | None = None, *,
              backend: str | None = None) -> None:
    """Makes keys of their projections and keeps them: x [t, d] is normed by norm [d], turned by turns complex [t, pairs], rounded
    (`rounding.round_kv`, `rounding.round_index` or not at all) and written to `to` [t, d], as by `keep`. If `to` is uint8,
    rounded keys are packed (cache.packed): [t, kv_bytes] or [t, index_bytes].

    row: int64 [1] in the device's memory, the row of `to` [n, d] that takes the only key, t = 1; it is read when the kernel
    runs, so a recorded launch may be repeated for another. Raises ValueError when shapes differ, for a rounding that there is
    not, or where blocks do not fit d.
    """
    t, d = x.shape
    demand_keys(t, d, norm, turns, rounding, to, row)
    pick("cache", x.device.type, backend).module.keep_keys(x, norm, eps, turns, rounding, to, row)


def demand_keys(t: int, d: int, norm: Tensor, turns: Tensor, rounding: Rounding, to: Tensor, row: Tensor | None) -> None:
    """Raises ValueError unless t vectors of d values can be kept so (see `keep_keys`)."""
    demand_shape("norm weight", norm, d)
    pairs = turns.shape[-1]
    demand_shape("turns", turns, t, pairs)
    if rounding not in ROUNDINGS:
        raise ValueError(f"there is no rounding {rounding!r}; there are {', '.join(ROUNDINGS)}")
    if rounding != "none":
        still = d - 2 * pairs
        demand_multiple("rounded part", still if rounding == "kv" else d, KV_BLOCK if rounding == "kv" else INDEX_BLOCK)
    width = d
    if to.dtype == uint8:
        if rounding == "none":
            raise ValueError("keys that are not rounded cannot be packed")
        width = index_bytes(d) if rounding == "index" else kv_bytes(d, 2 * pairs)
    demand_shape("cache rows", to, t if row is None else to.shape[0], width)
    if row is not None:
        demand_shape("row", row, 1)
        if t != 1:
            raise ValueError(f"a row takes the only key, but there are {t}")
