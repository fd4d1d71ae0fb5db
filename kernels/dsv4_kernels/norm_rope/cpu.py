"""RMS norm and rotation in C++; tensors other than float32 (turns: complex64) go the way of `ref`. Frequencies are computed once
per model, so they stay in torch."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64

from torch import Tensor, complex64, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.norm_rope import Entry, Placed, ref

signature("dsv4_rms_norm", P, P, I, I, F, P)
signature("dsv4_rotate", P, P, I, I, I, I, I, P)
signature("dsv4_norm_rotate", P, P, F, P, I, I, I, I, P)
signature("dsv4_turns", P, I, P, I, P)
signature("dsv4_place_token", P, P, P, I, I, P, I, P, P)

frequencies = ref.frequencies
_MOST = 4  # ratios that a token is placed for


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype != float32 or not x.numel() or (weight is not None and weight.dtype != float32):
        return by_torch(ref.rms_norm, x, weight, eps)
    x, weight = dense(x), None if weight is None else dense(weight)
    out = alloc.empty_like(x)
    d = x.shape[-1]
    load().dsv4_rms_norm(x.data_ptr(), None if weight is None else weight.data_ptr(), x.numel() // d, d, eps, out.data_ptr())
    return out


def rotate(x: Tensor, turns: Tensor, inverse: bool) -> Tensor:
    if x.dtype != float32 or turns.dtype != complex64 or turns.is_conj() or not x.numel():
        return by_torch(ref.rotate, x, turns, inverse)
    x, turns = dense(x), dense(turns)
    out = alloc.empty_like(x)
    t, d = x.shape[0], x.shape[-1]
    load().dsv4_rotate(x.data_ptr(), turns.data_ptr(), t, x.numel() // (t * d), d, turns.shape[1], inverse, out.data_ptr())
    return out


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, turns: Tensor) -> Tensor:
    if x.dtype != float32 or turns.dtype != complex64 or turns.is_conj() or not x.numel() or (
            weight is not None and weight.dtype != float32):
        return by_torch(ref.norm_rotate, x, weight, eps, turns)
    x, turns, weight = dense(x), dense(turns), None if weight is None else dense(weight)
    out = alloc.empty_like(x)
    t, d = x.shape[0], x.shape[-1]
    load().dsv4_norm_rotate(x.data_ptr(), None if weight is None else weight.data_ptr(), eps, turns.data_ptr(), t,
                            x.numel() // (t * d), d, turns.shape[1], out.data_ptr())
    return out


def turns(positions: Tensor, freqs: Tensor) -> Tensor:
    if positions.dtype != int64 or freqs.dtype != float32 or not positions.numel():
        return by_torch(ref.turns, positions, freqs)
    positions, freqs = alloc.held(dense(positions)), dense(freqs)
    out = alloc.empty((len(positions), len(freqs)), complex64)
    load().dsv4_turns(positions.data_ptr(), len(positions), freqs.data_ptr(), len(freqs), out.data_ptr())
    return out


def place_token(at: Tensor, window_freqs: Tensor, compress_freqs: Tensor, window: int, ratios: Sequence[int]) -> Placed:
    if at.dtype != int64 or not window_freqs.dtype == compress_freqs.dtype == float32 or len(ratios) > _MOST:
        return by_torch(ref.place_token, at, window_freqs, compress_freqs, window, ratios)
    at, window_freqs, compress_freqs = dense(at), dense(window_freqs), dense(compress_freqs)
    count, pairs = len(ratios), len(window_freqs)
    turned, numbers = alloc.empty((2 + count, pairs), complex64), alloc.empty((1 + 2 * count,), int64)
    load().dsv4_place_token(at.data_ptr(), window_freqs.data_ptr(), compress_freqs.data_ptr(), pairs, window,
                            (c_int64 * count)(*ratios), count, turned.data_ptr(), numbers.data_ptr())
    row, *rest = numbers.split(1)
    near, far, *of_groups = turned.split(1)
    return Placed(near, far, row, tuple(map(Entry, rest[::2], rest[1::2], of_groups)))
