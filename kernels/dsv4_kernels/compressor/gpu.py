"""Group pooling in Triton. Tensors other than float32, and a Pending that is not contiguous, go the way of `ref`.

A program owns some channels of a group: what they pool, and what of the tokens waits for the next call, is nobody else's. When
the tokens complete at most one group, as in decoding, that is a single launch; more groups are pooled in a first one, all at
once, and the second brings `pending` up to date.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.compressor import Pending, ref
from dsv4_kernels.gpu import Pointer, dense, padded

TILE = 1024  # values of a program: slots times channels


def compress(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending, position: int,
             at: Tensor | None = None) -> Tensor:
    if not _fits(kv, scores, ape, pending):
        return ref.compress(kv, scores, ape, pending, position)
    (t, width), ratio = kv.shape, ape.shape[0]
    halves = pending.kv.shape[0] // ratio
    d, filled = width // halves, position % ratio
    groups = (filled + t) // ratio
    entries = alloc.empty((groups, d), float32, kv.device)
    if t:
        live = kv if at is None else at
        given = dense(kv), dense(scores), dense(ape), pending.kv, pending.scores, entries, live, t, filled, ratio, d
        slots = padded(halves * ratio)
        shape = {"HALVES": halves, "SLOTS": slots, "LIVE": at is not None,
                 "WIDTH": min(padded(d), 32, max(8, TILE // slots))}
        tiles = triton.cdiv(d, shape["WIDTH"])
        if groups > 1:
            _compress[(tiles, groups)](*given, groups, POOL=True, KEEP=False, **shape)
        _compress[(tiles, 1)](*given, groups, POOL=groups == 1, KEEP=True, **shape)
    return entries


def _fits(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending) -> bool:
    return (kv.dtype == scores.dtype == ape.dtype == pending.kv.dtype == pending.scores.dtype == float32
            and pending.kv.is_contiguous() and pending.scores.is_contiguous())


@triton.jit(do_not_specialize=["t", "filled", "groups"])
def _compress(kv: Pointer, scores: Pointer, ape: Pointer, pending_kv: Pointer, pending_scores: Pointer, entries: Pointer,
              position: Pointer, t: int, filled: int, ratio: int, d: int, groups: int, POOL: tl.constexpr, KEEP: tl.constexpr,
              LIVE: tl.constexpr, HALVES: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """WIDTH channels of a group's entry, of both halves where groups overlap.

    Row r counts the slots of `pending` that are filled, and after them the tokens: r < before + filled lies in `pending`.
    Candidate i of group g is row g * ratio + i; those of the previous group count with their first half. LIVE: the token's
    position is read from `position`, and `filled` says nothing.
    """
    if LIVE:
        filled = (tl.load(position) % ratio).to(tl.int32)
    channel = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))[None, :]
    slot = tl.arange(0, SLOTS)[:, None]
    before = (HALVES - 1) * ratio
    known, slots = before + filled, before + ratio
    if POOL:
        row = tl.program_id(1) * ratio + slot
        inside = (slot < slots) & (channel < d)
        at = channel + tl.where(slot < before, 0, (HALVES - 1) * d)
        old, new = inside & (row < known), inside & (row >= known)
        token = (row - known).to(tl.int64) * (HALVES * d) + at
        shift = tl.load(ape + (row - before + ratio) % ratio * (HALVES * d) + at, new, 0.0)
        score = tl.where(row < known, tl.load(pending_scores + row * (HALVES * d) + at, old, float("-inf")),
                         tl.load(scores + token, new, float("-inf")) + shift)
        value = tl.where(row < known, tl.load(pending_kv + row * (HALVES * d) + at, old, 0.0), tl.load(kv + token, new, 0.0))
        share = tl.exp(score - tl.max(tl.where(inside, score, -1e38), 0)[None, :])
        share = tl.where(inside, share, 0.0)
        entry = tl.sum(share * value, 0) / tl.sum(share, 0)
        place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        tl.store(entries + tl.program_id(1).to(tl.int64) * d + place, entry, place < d)
    if KEEP:
        # Slot i becomes row groups * ratio + i, as far as there are rows; without a new group the first ones stay.
        row = groups * ratio + slot
        inside = (slot < slots) & (channel < d) & (row < known + t) & (row >= tl.where(groups > 0, 0, known))
        old, new = inside & (row < known), inside & (row >= known)
        for half in tl.static_range(HALVES):
            at = channel + half * d
            token = (row - known).to(tl.int64) * (HALVES * d) + at
            shift = tl.load(ape + (row - before + ratio) % ratio * (HALVES * d) + at, new, 0.0)
            score = tl.where(row < known, tl.load(pending_scores + row * (HALVES * d) + at, old, 0.0),
                             tl.load(scores + token, new, 0.0) + shift)
            value = tl.where(row < known, tl.load(pending_kv + row * (HALVES * d) + at, old, 0.0), tl.load(kv + token, new, 0.0))
            tl.debug_barrier()  # all of this program's threads have read what it now overwrites
            tl.store(pending_scores + slot * (HALVES * d) + at, score, inside)
            tl.store(pending_kv + slot * (HALVES * d) + at, value, inside)


AHEAD = (
    Case(_compress, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32 i32:16 i32",
         {"POOL": True, "KEEP": True, "LIVE": True, "HALVES": 2, "SLOTS": 8, "WIDTH": 32}),
    Case(_compress, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32:16 i32:16 i32",
         {"POOL": True, "KEEP": True, "LIVE": True, "HALVES": 1, "SLOTS": 128, "WIDTH": 8}),
)
