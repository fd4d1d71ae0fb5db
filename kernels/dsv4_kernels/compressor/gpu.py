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
from dsv4_kernels.gpu import Block, Pointer, dense, padded

TILE = 1024  # values of a program: slots times channels


def compress(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending, position: int,
             at: Tensor | None = None) -> Tensor:
    if not fits(kv, scores, ape, pending):
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
        shape = {"HALVES": halves, "SLOTS": slots, "LIVE": at is not None, "WIDTH": channels(slots, d)}
        tiles = triton.cdiv(d, shape["WIDTH"])
        if groups > 1:
            _compress[(tiles, groups)](*given, groups, POOL=True, KEEP=False, **shape)
        _compress[(tiles, 1)](*given, groups, POOL=groups == 1, KEEP=True, **shape)
    return entries


def channels(slots: int, d: int) -> int:
    """Of a program that pools so many slots."""
    return min(padded(d), 32, max(8, TILE // slots))


def fits(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending) -> bool:
    """Whether the kernels read and write such tensors."""
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
    first = tl.program_id(0) * WIDTH
    if POOL:
        entry = pooled(kv, scores, ape, pending_kv, pending_scores, tl.program_id(1), first, filled, ratio, d, HALVES, SLOTS,
                       WIDTH)
        place = first + tl.arange(0, WIDTH)
        tl.store(entries + tl.program_id(1).to(tl.int64) * d + place, entry, place < d)
    if KEEP:
        keep_pending(kv, scores, ape, pending_kv, pending_scores, first, t, filled, groups, ratio, d, HALVES, SLOTS, WIDTH)


@triton.jit
def pooled(kv: Pointer, scores: Pointer, ape: Pointer, pending_kv: Pointer, pending_scores: Pointer, group: int, first: int,
           filled: int, ratio: int, d: int, HALVES: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr) -> Block:
    """Channels first .. first + WIDTH of a full group's entry; behind d they mean nothing."""
    channel = (first + tl.arange(0, WIDTH))[None, :]
    slot = tl.arange(0, SLOTS)[:, None]
    before = (HALVES - 1) * ratio
    known = before + filled
    row = group * ratio + slot
    inside = (slot < before + ratio) & (channel < d)
    at = channel + tl.where(slot < before, 0, (HALVES - 1) * d)
    old, new = inside & (row < known), inside & (row >= known)
    token = (row - known).to(tl.int64) * (HALVES * d) + at
    shift = tl.load(ape + (row - before + ratio) % ratio * (HALVES * d) + at, new, 0.0)
    score = tl.where(row < known, tl.load(pending_scores + row * (HALVES * d) + at, old, float("-inf")),
                     tl.load(scores + token, new, float("-inf")) + shift)
    value = tl.where(row < known, tl.load(pending_kv + row * (HALVES * d) + at, old, 0.0), tl.load(kv + token, new, 0.0))
    share = tl.exp(score - tl.max(tl.where(inside, score, -1e38), 0)[None, :])
    share = tl.where(inside, share, 0.0)
    return tl.sum(share * value, 0) / tl.sum(share, 0)


@triton.jit
def keep_pending(kv: Pointer, scores: Pointer, ape: Pointer, pending_kv: Pointer, pending_scores: Pointer, first: int, t: int,
                 filled: int, groups: int, ratio: int, d: int, HALVES: tl.constexpr, SLOTS: tl.constexpr,
                 WIDTH: tl.constexpr) -> None:
    """Slot i becomes row groups * ratio + i, as far as there are rows; without a new group the first ones stay. No other program
    may use these channels of `pending` meanwhile."""
    channel = (first + tl.arange(0, WIDTH))[None, :]
    slot = tl.arange(0, SLOTS)[:, None]
    before = (HALVES - 1) * ratio
    known = before + filled
    row = groups * ratio + slot
    inside = (slot < before + ratio) & (channel < d) & (row < known + t) & (row >= tl.where(groups > 0, 0, known))
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


@triton.jit
def append_pending(kv: Pointer, scores: Pointer, ape: Pointer, pending_kv: Pointer, pending_scores: Pointer, first: int,
                   filled: int, ratio: int, d: int, HALVES: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """A token that completes no group takes its slot: channels first .. first + WIDTH of both halves' HALVES * d."""
    width = HALVES * d
    channel = first + tl.arange(0, WIDTH)
    slot = ((HALVES - 1) * ratio + filled) * width + channel
    score = tl.load(scores + channel, channel < width, 0.0) + tl.load(ape + filled * width + channel, channel < width, 0.0)
    tl.store(pending_scores + slot, score, channel < width)
    tl.store(pending_kv + slot, tl.load(kv + channel, channel < width, 0.0), channel < width)


AHEAD = (
    Case(_compress, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32 i32:16 i32",
         {"POOL": True, "KEEP": True, "LIVE": True, "HALVES": 2, "SLOTS": 8, "WIDTH": 32}),
    Case(_compress, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32:16 i32:16 i32",
         {"POOL": True, "KEEP": True, "LIVE": True, "HALVES": 1, "SLOTS": 128, "WIDTH": 8}),
)
