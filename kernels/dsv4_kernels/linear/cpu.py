"""Matrix products in C++, straight on the bytes of the file.

Formats of 8 bits and less (but for FP8) meet activations that are rounded to bytes, 32 with one scale; the others, and FP8,
meet them as they are. What has no kernel (another format, activations that are not float32) goes the way of `ref`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.linear import Norm, ref
from dsv4_kernels.linear import Weight as Given
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.native.weights import Weight, native
from dsv4_kernels.norm_rope.cpu import rms_norm

signature("dsv4_linear", P, I, I, P, P)
signature("dsv4_linears", P, I, P, I, P)
signature("dsv4_embed", P, I, P, I, P)


def embed(ids: Tensor, table: Given, times: int | None = None) -> Tensor:
    found = native(table)
    if found is None or ids.dtype != int64 or not ids.numel():
        return by_torch(ref.embed, ids, table, times)
    ids = dense(ids)
    out = alloc.empty((len(ids), times or 1, found.cols), float32)
    load().dsv4_embed(ids.data_ptr(), len(ids), ctypes.byref(found), times or 1, out.data_ptr())
    return out.flatten(1) if times is None else out


def linear(x: Tensor, weight: Given) -> Tensor:
    found = native(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return by_torch(ref.linear, x, weight)
    x = dense(x)
    out = alloc.empty((*x.shape[:-1], found.rows), float32)
    load().dsv4_linear(x.data_ptr(), x.numel() // found.cols, 1, ctypes.byref(found), out.data_ptr())
    return out


def linears(x: Tensor, weights: Sequence[Given], norm: Norm | None = None) -> list[Tensor]:
    if norm is not None:
        x = rms_norm(x, *norm)
    found = [native(weight) for weight in weights]
    known = [struct for struct in found if struct is not None]
    if len(known) < len(found) or x.dtype != float32 or not x.numel():
        return [linear(x, weight) for weight in weights]
    x = dense(x)
    count = x.numel() // x.shape[-1]
    sizes = [count * struct.rows for struct in known]
    out = alloc.empty((sum(sizes),), float32)
    load().dsv4_linears(x.data_ptr(), count, (Weight * len(known))(*known), len(known), out.data_ptr())
    shape = x.shape[:-1]
    return [part.view(*shape, -1) for part in out.split(sizes)]


def grouped_linear(x: Tensor, weight: Given) -> Tensor:
    found = native(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return by_torch(ref.grouped_linear, x, weight)
    x = dense(x)
    tokens, groups, _ = x.shape
    out = alloc.empty((tokens, groups, found.rows // groups), float32)
    load().dsv4_linear(x.data_ptr(), tokens, groups, ctypes.byref(found), out.data_ptr())
    return out
