"""Attention over a sliding window, compressed entries and a sink, in one softmax (spec/checkpoint.md section 3.7)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, uint8

from dsv4_kernels.backends import pick
from dsv4_kernels.cache.packed import kv_bytes
from dsv4_kernels.checks import demand_shape


class Entries(NamedTuple):
    """Compressed entries and who sees them.

    kv [n, d]; visible int64 [t]: token i sees the first visible[i] entries; chosen int64 [t, k]: of these only the
    chosen (-1: none), or None for all.
    """

    kv: Tensor
    visible: Tensor
    chosen: Tensor | None


def sparse_attention(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor, window: int,
                     turns: Tensor | None = None, at: Tensor | None = None, eps: float | None = None, *,
                     backend: str | None = None) -> Tensor:
    """softmax(q . kv / sqrt(d)) . kv, where each kv vector is key and value of every head.

    q [t, heads, d]; recent [m + t, d]: the m tokens before the first query's and the queries' own, in order; query i
    sees the last `window` of recent[: m + i + 1] (for t = 1 the order is free). sink [heads] takes part in the
    denominator alone. kv may be of a narrower float type, or packed (cache.packed), uint8 [.., kv_bytes], with as many
    values in bf16 as `turns` turn. -> like q. Keys are scored in tiles of queries. With turns complex
    [t, pairs] the result is turned back by them: a key carries its rotation into the value that it also is. at: int64 [1], the
    position of the only query in the device's memory, from where a recorded launch reads it each time; `recent` is then a ring
    of `window` rows, of which those of the last at + 1 tokens are filled. eps: q is as it was projected; first each head is
    normed (norm_rope.rms_norm without a weight) and turned by `turns`.
    """
    t, heads, d = q.shape
    width = d if recent.dtype != uint8 else kv_bytes(d, 0 if turns is None else 2 * turns.shape[-1])
    demand_shape("recent", recent, len(recent), width)
    demand_shape("sink", sink, heads)
    if len(recent) < t:
        raise ValueError(f"{t} queries have only {len(recent)} window keys; each must at least see its own")
    if entries is not None:
        demand_shape("entries", entries.kv, len(entries.kv), width)
        demand_shape("visible", entries.visible, t)
        if entries.chosen is not None:
            demand_shape("chosen", entries.chosen, t, None)
    if at is not None:
        demand_shape("position", at, 1)
        demand_shape("q", q, 1, None, None)
        demand_shape("ring", recent, window, width)
    if eps is not None and turns is None:
        raise ValueError("queries that are to be normed need turns")
    if turns is not None:
        demand_shape("turns", turns, t, turns.shape[-1])
    return pick("attention", q.device.type, backend).module.sparse_attention(q, recent, entries, sink, window, turns, at, eps)
