"""Experts in C++: all chosen experts of a layer in one call.

As in `linear`, packed weights meet activations rounded to bytes. Experts of several formats or shapes, formats without a
kernel and activations that are not float32 go the way of `ref`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor, float32, inference_mode, int64, ones, zeros

from dsv4_kernels import alloc
from dsv4_kernels.moe import Expert, Experts, ref
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.native.weights import Weight, native

signature("dsv4_add_experts", P, I, P, P, I, P, I, F, I, P)
signature("dsv4_ask_for", P, P, I)
_SLOT = "_native_bank"  # where Experts keep the array of their structs


def routed_experts(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert], limit: float,
                   onto: Tensor | None = None) -> Tensor:
    bank = bank_of(experts) if x.dtype == weights.dtype == float32 and x.numel() and weights.numel() else None
    if bank is None or (onto is not None and onto.dtype != float32):
        return by_torch(ref.routed_experts, x, weights, chosen, experts, limit, onto)
    x, weights, chosen = dense(x), dense(weights), dense(chosen)
    out = alloc.empty_like(x) if onto is None else onto
    load().dsv4_add_experts(x.data_ptr(), x.shape[0], weights.data_ptr(), chosen.data_ptr(), chosen.shape[1], bank,
                            len(experts), limit, onto is None, out.data_ptr())
    return out


def shared_expert(x: Tensor, expert: Expert, limit: float) -> Tensor:
    """An expert that everybody chose, with weight 1."""
    return routed_experts(x, *_everybody(x.shape[0]), (expert,), limit)


def ask_for(experts: Sequence[Expert], numbers: Sequence[int]) -> None:
    bank = bank_of(experts)
    if bank is not None:
        load().dsv4_ask_for(bank, (ctypes.c_int64 * len(numbers))(*numbers), len(numbers))


@lru_cache(maxsize=4)
def _everybody(tokens: int) -> tuple[Tensor, Tensor]:
    with inference_mode(False):
        return ones(tokens, 1), zeros(tokens, 1, dtype=int64)


def bank_of(experts: Sequence[Expert]) -> ctypes.Array[Weight] | None:
    """Gate, up and down of each expert in turn; None when they cannot be computed together. Kept for Experts."""
    if not isinstance(experts, Experts):
        return alloc.held(_gathered(experts))
    known = vars(experts)
    if _SLOT not in known:
        known[_SLOT] = _gathered(experts)
    found: ctypes.Array[Weight] | None = known[_SLOT]
    return found


def _gathered(experts: Sequence[Expert]) -> ctypes.Array[Weight] | None:
    found = []
    kinds = set()
    for expert in experts:
        for place, part in enumerate((expert.w1, expert.w3, expert.w2)):
            struct = native(part)
            if struct is None:
                return None
            found.append(struct)
            kinds.add((place, struct.format, struct.rows, struct.cols))
    return (Weight * len(found))(*found) if len(kinds) == 3 else None
