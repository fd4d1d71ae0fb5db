"""What lies between a layer's projections and its attention: keys are kept, groups compressed, index queries turned
(spec/checkpoint.md sections 3.4, 3.8, 3.9 and 3.14).

One door for all of it, since nothing here waits for anything else, so that a decoded token's is one launch on a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.cache import Rounding, demand_keys
from dsv4_kernels.checks import demand_multiple, demand_shape
from dsv4_kernels.compressor import Pending, demand_tokens
from dsv4_kernels.rounding import INDEX_BLOCK


class Keeping(NamedTuple):
    """How vectors become keys of a cache, and which; all but the vectors as of `cache.keep_keys`."""

    norm: Tensor
    turns: Tensor  # complex [n, pairs]
    rounding: Rounding
    to: Tensor
    row: Tensor | None = None


class Compression(NamedTuple):
    """A compressor's share, as of `compressor.compress`; and how the entries of the groups that the tokens complete are kept,
    None if they complete none."""

    kv: Tensor
    scores: Tensor
    ape: Tensor
    pending: Pending
    entries: Keeping | None


class Queries(NamedTuple):
    """Index queries x [t, heads, d] as they were projected, how their last values are turned, complex [t, pairs], and whether
    they are then rounded as index keys are ("index") or not ("none")."""

    x: Tensor
    turns: Tensor
    rounding: Rounding


def attention_prologue(kv: Tensor, keys: Keeping, compressions: Sequence[Compression], queries: Queries | None, eps: float,
                       position: int, at: Tensor | None = None, *, backend: str | None = None) -> Tensor | None:
    """Keeps the keys kv [t, d] of tokens position .. position + t; lets every compressor take the same tokens and keeps the
    entries that they complete; -> queries turned and rounded, like x or as `rounding.round_index` gives them, or None.

    at: int64 [1], the position in the device's memory, from where a recorded launch reads it each time. No two may write to the
    same memory. Raises ValueError when shapes differ, or there are other entries to keep than tokens complete.
    """
    t, d = kv.shape
    if at is not None:
        demand_shape("kv", kv, 1, d)
    demand_keys(t, d, *keys)
    for own, scores, ape, pending, entries in compressions:
        d, ratio = demand_tokens(t, own, scores, ape, pending), ape.shape[0]
        groups = (position % ratio + t) // ratio
        if entries is not None:
            demand_keys(groups, d, *entries)
        elif groups:
            raise ValueError(f"{t} tokens at position {position} complete {groups} groups of {ratio}, which nobody keeps")
    if queries is not None:
        demand_shape("index queries", queries.x, t, None, None)
        demand_shape("turns of index queries", queries.turns, t, None)
        if queries.rounding == "index":
            demand_multiple("index queries' last axis", queries.x.shape[-1], INDEX_BLOCK)
    chosen = pick("prologue", kv.device.type, backend)
    return chosen.module.attention_prologue(kv, keys, compressions, queries, eps, position, at)


class Steps(NamedTuple):
    """One backend's modules of the operations that a prologue consists of."""

    cache: ModuleType
    compressor: ModuleType
    norm_rope: ModuleType
    rounding: ModuleType


def one_by_one(by: Steps, kv: Tensor, keys: Keeping, compressions: Sequence[Compression], queries: Queries | None, eps: float,
               position: int, at: Tensor | None) -> Tensor | None:
    """The prologue as its operations, one after the other."""
    norm, turns, rounding, to, row = keys
    by.cache.keep_keys(kv, norm, eps, turns, rounding, to, row)
    for own, scores, ape, pending, entries in compressions:
        pooled = by.compressor.compress(own, scores, ape, pending, position, at)
        if entries is not None:
            norm, turns, rounding, to, row = entries
            by.cache.keep_keys(pooled, norm, eps, turns, rounding, to, row)
    if queries is None:
        return None
    if queries.rounding == "index":
        return by.rounding.round_index(queries.x, queries.turns)
    return by.norm_rope.rotate(queries.x, queries.turns, False)
