"""Group pooling in C++. Tensors other than float32, and a Pending that is not contiguous, go the way of `ref`."""

from __future__ import annotations

from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.compressor import Pending, ref
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense

signature("dsv4_compress", P, P, P, P, P, I, I, I, I, I, P, P)


def compress(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending, position: int,
             at: Tensor | None = None) -> Tensor:
    if not _fits(kv, scores, ape, pending):
        return by_torch(ref.compress, kv, scores, ape, pending, position, at)
    kv, scores, ape = dense(kv), dense(scores), dense(ape)
    (t, width), ratio = kv.shape, ape.shape[0]
    halves = pending.kv.shape[0] // ratio
    d = width // halves
    entries = alloc.empty(((position % ratio + t) // ratio, d), float32)
    load().dsv4_compress(kv.data_ptr(), scores.data_ptr(), ape.data_ptr(), pending.kv.data_ptr(), pending.scores.data_ptr(),
                         t, ratio, d, halves, position, None if at is None else at.data_ptr(), entries.data_ptr())
    return entries


def _fits(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending) -> bool:
    return (kv.dtype == scores.dtype == ape.dtype == pending.kv.dtype == pending.scores.dtype == float32
            and pending.kv.is_contiguous() and pending.scores.is_contiguous())
