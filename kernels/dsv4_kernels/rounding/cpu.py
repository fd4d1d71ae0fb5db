"""Rounding and the Hadamard turn in C++, equal to `ref` bit for bit where both round the same numbers.

Tensors other than float32 go the way of `ref`, and so do the scales themselves, which only tests ask for.
"""

from __future__ import annotations

from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.norm_rope.cpu import rotate
from dsv4_kernels.rounding import INDEX_BLOCK, KV_BLOCK, ref

signature("dsv4_round_fp8", P, I, I, P)
signature("dsv4_round_fp4", P, I, I, P)
signature("dsv4_round_kv", P, I, I, I, I, P)
signature("dsv4_hadamard", P, I, I, I, P)

power_of_two_scale = ref.power_of_two_scale


def round_fp8(x: Tensor, block: int) -> Tensor:
    if x.dtype != float32:
        return by_torch(ref.round_fp8, x, block)
    x = dense(x)
    out = alloc.empty_like(x)
    load().dsv4_round_fp8(x.data_ptr(), x.numel() // block, block, out.data_ptr())
    return out


def round_fp4(x: Tensor, block: int) -> Tensor:
    if x.dtype != float32:
        return by_torch(ref.round_fp4, x, block)
    x = dense(x)
    out = alloc.empty_like(x)
    load().dsv4_round_fp4(x.data_ptr(), x.numel() // block, block, out.data_ptr())
    return out


def round_kv(x: Tensor, rotated: int) -> Tensor:
    if x.dtype != float32:
        return by_torch(ref.round_kv, x, rotated)
    x = dense(x)
    out = alloc.empty_like(x)
    d = x.shape[-1]
    load().dsv4_round_kv(x.data_ptr(), x.numel() // d, d, rotated, KV_BLOCK, out.data_ptr())
    return out


def hadamard(x: Tensor) -> Tensor:
    return by_torch(ref.hadamard, x) if x.dtype != float32 else _turned(x, 0)


def round_index(x: Tensor, turns: Tensor | None = None) -> Tensor:
    if turns is not None:
        x = rotate(x, turns, False)
    return by_torch(ref.round_index, x) if x.dtype != float32 else _turned(x, INDEX_BLOCK)


def _turned(x: Tensor, block: int) -> Tensor:
    """Rounded to FP4 in blocks, unless `block` is 0."""
    x = dense(x)
    out = alloc.empty_like(x)
    n = x.shape[-1]
    load().dsv4_hadamard(x.data_ptr(), x.numel() // n, n, block, out.data_ptr())
    return out
