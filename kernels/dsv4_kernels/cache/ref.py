"""Keeping rows in plain torch."""

from __future__ import annotations

from torch import Tensor, uint8

from dsv4_kernels.cache import Rounding
from dsv4_kernels.cache.packed import pack_index, pack_kv
from dsv4_kernels.norm_rope.ref import norm_rotate
from dsv4_kernels.rounding.ref import round_index, round_kv


def keep(rows: Tensor, to: Tensor) -> None:
    to.copy_(rows)


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor,
              row: Tensor | None = None) -> None:
    keys = norm_rotate(x, norm, eps, turns)
    if rounding == "kv":
        keys = round_kv(keys, 2 * turns.shape[-1])
    elif rounding == "index":
        keys = round_index(keys)
    if to.dtype == uint8:
        keys = pack_index(keys) if rounding == "index" else pack_kv(keys, 2 * turns.shape[-1])
    if row is None:
        keep(keys, to)
    else:
        to.index_copy_(0, row, keys.to(to.dtype))
