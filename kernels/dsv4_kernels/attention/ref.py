"""Window, entries and sink under one softmax, in plain torch, a tile of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor, uint8

from dsv4_kernels import alloc
from dsv4_kernels.attention import Entries
from dsv4_kernels.cache.packed import unpack_kv
from dsv4_kernels.norm_rope.ref import norm_rotate, rotate
from dsv4_kernels.tiles import tiles

NEVER = float("-inf")


def sparse_attention(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor, window: int,
                     turns: Tensor | None = None, at: Tensor | None = None, eps: float | None = None) -> Tensor:
    t, heads, d = q.shape
    if eps is not None and turns is not None:
        q = norm_rotate(q, None, eps, turns)
    if at is not None:
        recent = recent[:min(int(at) + 1, window)]
    if recent.dtype == uint8:
        rotated = 0 if turns is None else 2 * turns.shape[-1]
        recent = unpack_kv(recent, rotated)
        entries = None if entries is None else entries._replace(kv=unpack_kv(entries.kv, rotated))
    out = alloc.empty_like(q)
    q = q * d ** -0.5
    recent = recent.to(q.dtype)
    shared = entries.kv.to(q.dtype) if entries is not None and entries.chosen is None else None
    for rows in tiles(t, _values_per_row(heads, d, entries, window), most=window):
        near = _near_keys(recent, rows, t, window)
        keys = [near]
        scores = [_near_scores(q[rows], near, window)]
        if entries is not None and len(entries.kv):
            far, far_scores = _far_scores(q[rows], entries, rows, shared)
            keys.append(far)
            scores.append(far_scores)
        sinks = sink.to(q.dtype).expand(len(scores[0]), heads).unsqueeze(-1)
        weights = torch.cat([*scores, sinks], -1).softmax(-1)  # the sink's share is dropped below
        shares = weights[..., :-1].split([part.shape[-1] for part in scores], -1)
        out[rows] = sum(share @ kv for share, kv in zip(shares, keys, strict=True))
    return out if turns is None else rotate(out, turns, True)


def _values_per_row(heads: int, d: int, entries: Entries | None, window: int) -> int:
    """Of the scores and the gathered entries. A tile has at most `window` rows, so they share 2 * window near keys."""
    if entries is None:
        return heads * 2 * window
    if entries.chosen is None:
        return heads * (2 * window + len(entries.kv))
    return heads * 2 * window + max(heads, d) * entries.chosen.shape[1]


def _near_keys(recent: Tensor, rows: slice, t: int, window: int) -> Tensor:
    """The stretch of `recent` that at least one query of the tile sees."""
    before = len(recent) - t
    return recent[max(0, before + rows.start - window + 1):before + rows.stop]


def _near_scores(q: Tensor, near: Tensor, window: int) -> Tensor:
    """q [r, heads, d], near [m, d] -> [r, heads, m]; the last r of `near` are the queries' own."""
    scores = q @ near.T
    if len(q) > 1:
        own = torch.arange(len(near) - len(q), len(near), device=q.device).unsqueeze(1)
        place = torch.arange(len(near), device=q.device)
        unseen = (place > own) | (place <= own - window)
        scores.masked_fill_(unseen.unsqueeze(1), NEVER)
    return scores


def _far_scores(q: Tensor, entries: Entries, rows: slice, shared: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entries for each query of the tile, [n, d] or gathered [r, k, d], and their scores [r, heads, n or k]."""
    visible = entries.visible[rows, None]
    if shared is not None:
        scores = q @ shared.T
        unseen = torch.arange(len(shared), device=q.device) >= visible
        return shared, scores.masked_fill_(unseen.unsqueeze(1), NEVER)
    assert entries.chosen is not None
    chosen = entries.chosen[rows]
    gathered = entries.kv[chosen.clamp(min=0)].to(q.dtype)
    scores = torch.bmm(q, gathered.transpose(1, 2))
    unseen = (chosen < 0) | (chosen >= visible)
    return gathered, scores.masked_fill_(unseen.unsqueeze(1), NEVER)
