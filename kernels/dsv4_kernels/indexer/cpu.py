"""Index scores and their top k in C++; ties go to the earlier entry. Queries that are not float32, and keys that are neither
float32 nor bfloat16, go the way of `ref`."""

from __future__ import annotations

from torch import Tensor, bfloat16, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.indexer import ref
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense

signature("dsv4_top_indices", P, P, I, I, I, P, P, I, I, I, P)


def top_indices(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> Tensor:
    native = q.dtype == weights.dtype == float32 and keys.dtype in (float32, bfloat16) and visible.dtype == int64
    if not native or not len(keys):
        return by_torch(ref.top_indices, q, weights, keys, visible, k)
    t, heads, d = q.shape
    q, weights, keys, visible = dense(q), dense(weights), dense(keys), dense(visible)
    slots = min(k, len(keys))
    chosen = alloc.empty((t, slots), int64)
    load().dsv4_top_indices(q.data_ptr(), weights.data_ptr(), t, heads, d, keys.data_ptr(), visible.data_ptr(), len(keys),
                            slots, keys.dtype == bfloat16, chosen.data_ptr())
    return chosen
