"""Matrix products in C++, straight on the bytes of the file.

Formats of 8 bits and less (but for FP8) meet activations that are rounded to bytes, 32 with one scale; the others, and FP8,
meet them as they are. What has no kernel (another format, activations that are not float32) goes the way of `ref`.
"""

from __future__ import annotations

import ctypes

from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.linear import Weight, ref
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.native.weights import native

signature("dsv4_linear", P, I, I, P, P)

embed = ref.embed  # a few rows are decoded soon enough


def linear(x: Tensor, weight: Weight) -> Tensor:
    found = native(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return by_torch(ref.linear, x, weight)
    x = dense(x)
    out = alloc.empty((*x.shape[:-1], found.rows), float32)
    load().dsv4_linear(x.data_ptr(), x.numel() // found.cols, 1, ctypes.byref(found), out.data_ptr())
    return out


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    found = native(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return by_torch(ref.grouped_linear, x, weight)
    x = dense(x)
    tokens, groups, _ = x.shape
    out = alloc.empty((tokens, groups, found.rows // groups), float32)
    load().dsv4_linear(x.data_ptr(), tokens, groups, ctypes.byref(found), out.data_ptr())
    return out
