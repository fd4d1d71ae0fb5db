"""RMS norm and rotation in C++; tensors other than float32 (turns: complex64) go the way of `ref`.

Frequencies and turns are computed once per forward pass or less, so they stay in torch.
"""

from __future__ import annotations

from torch import Tensor, complex64, float32

from dsv4_kernels import alloc
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.norm_rope import ref

signature("dsv4_rms_norm", P, P, I, I, F, P)
signature("dsv4_rotate", P, P, I, I, I, I, I, P)
signature("dsv4_norm_rotate", P, P, F, P, I, I, I, I, P)

frequencies = ref.frequencies
turns = ref.turns
place_token = ref.place_token


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
