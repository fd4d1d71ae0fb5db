"""Keeping rows on the card: torch's own copy is one launch and rounds as it should."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.cache import Rounding, ref
from dsv4_kernels.norm_rope.gpu import norm_rotate
from dsv4_kernels.rounding.gpu import round_index, round_kv

keep = ref.keep

AHEAD = ()


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor) -> None:
    keys = norm_rotate(x, norm, eps, turns)
    if rounding == "kv":
        keys = round_kv(keys, 2 * turns.shape[-1])
    elif rounding == "index":
        keys = round_index(keys)
    keep(keys, to)
