"""Routers in C++. As in `linear`, a packed gate of 8 bits or less meets activations rounded to bytes.

Of equal scores the expert of lower number is chosen. Gates in formats without a kernel and tensors that are not float32
(table and ids: int64) go the way of `ref`.
"""

from __future__ import annotations

from ctypes import byref, c_int64
from functools import partial

from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.linear import Weight
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense, later
from dsv4_kernels.native.weights import native
from dsv4_kernels.router import ref

signature("dsv4_route_learned", P, I, P, P, I, F, P, P)
signature("dsv4_route_by_hash", P, I, P, P, I, I, P, F, P, P, P)


def route_learned(x: Tensor, gate: Weight, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    found = native(gate) if x.dtype == bias.dtype == float32 else None
    if found is None:
        return by_torch(ref.route_learned, x, gate, bias, k, scale)
    x, bias = dense(x), dense(bias)
    t = x.shape[0]
    weights, experts = alloc.empty((t, k), float32), alloc.empty((t, k), int64)
    load().dsv4_route_learned(x.data_ptr(), t, byref(found), bias.data_ptr(), k, scale, weights.data_ptr(),
                              experts.data_ptr())
    return weights, experts


def route_by_hash(x: Tensor, gate: Weight, table: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Raises IndexError for an id that is not in the table, or an expert of the table that is not in the gate."""
    found = native(gate) if x.dtype == float32 and table.dtype == ids.dtype == int64 else None
    if found is None:
        return by_torch(ref.route_by_hash, x, gate, table, ids, scale)
    x, table, ids = dense(x), dense(table), dense(ids)
    t, (vocab, k) = x.shape[0], table.shape
    weights, experts = alloc.empty((t, k), float32), alloc.empty((t, k), int64)
    wrong = c_int64()
    load().dsv4_route_by_hash(x.data_ptr(), t, byref(found), table.data_ptr(), vocab, k, ids.data_ptr(), scale,
                              weights.data_ptr(), experts.data_ptr(), byref(wrong))
    later(partial(_demand_right, wrong, vocab, found.rows))
    return weights, experts


def _demand_right(wrong: c_int64, vocab: int, rows: int) -> None:
    if wrong.value:
        raise IndexError(f"a token id is outside the table of {vocab}, or an expert in it outside the {rows}")
