"""Attention in C++, with keys read where they lie. Queries that are not float32, and keys that are neither float32 nor
bfloat16, go the way of `ref`."""

from __future__ import annotations

from torch import Tensor, bfloat16, complex64, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.attention import Entries, ref
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense
from dsv4_kernels.norm_rope.cpu import norm_rotate

signature("dsv4_sparse_attention", P, I, I, I, P, I, P, I, P, P, I, P, I, I, P, I, P, P)


def sparse_attention(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor, window: int,
                     turns: Tensor | None = None, at: Tensor | None = None, eps: float | None = None) -> Tensor:
    if entries is not None and not len(entries.kv):
        entries = None
    if not q.dtype == sink.dtype == float32 or recent.dtype not in (float32, bfloat16) or (
            not _fit(entries, recent)) or (turns is not None and (turns.dtype != complex64 or turns.is_conj())):
        return by_torch(ref.sparse_attention, q, recent, entries, sink, window, turns, at, eps)
    if eps is not None and turns is not None:
        q = norm_rotate(q, None, eps, turns)
    t, heads, d = q.shape
    q, recent, sink = dense(q), dense(recent), dense(sink)
    out = alloc.empty_like(q)
    kv = visible = chosen = None
    n = k = pairs = 0
    if turns is not None:
        turns, pairs = dense(turns), turns.shape[1]
    if entries is not None:
        n, kv, visible = len(entries.kv), dense(entries.kv), dense(entries.visible)
        if entries.chosen is not None:
            chosen, k = dense(entries.chosen), entries.chosen.shape[1]
    load().dsv4_sparse_attention(q.data_ptr(), t, heads, d, recent.data_ptr(), len(recent), _place(kv), n,
                                 _place(visible), _place(chosen), k, sink.data_ptr(), window, recent.dtype == bfloat16,
                                 _place(turns), pairs, _place(at), out.data_ptr())
    return out


def _fit(entries: Entries | None, recent: Tensor) -> bool:
    if entries is None:
        return True
    whole = entries.visible.dtype == int64 and (entries.chosen is None or entries.chosen.dtype == int64)
    return entries.kv.dtype == recent.dtype and whole


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
