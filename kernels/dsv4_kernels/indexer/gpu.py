"""Index scores and their top k in Triton; ties go to the earlier entry, and what is chosen comes in the entries' order.

Two launches for a tile of tokens: programs that own some tokens and some entries leave scores behind, as whole numbers in the
scores' order; then a program that owns a token finds the k-th greatest of them by counting digits, eight bits at a time, and
writes down who is not below it. A tile of tokens is so small that its scores take at most 64 MB. Rounded queries come as
bfloat16, which holds them, and meet bfloat16 or packed keys in one product; float32 ones take three. Other queries, and other
keys than these and float32, go the way of `ref`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32, int32, int64, uint8

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.cache.gpu import form, kept_index
from dsv4_kernels.gpu import CACHED, DOT, Block, Pointer, dense, in_order, multiplied, padded
from dsv4_kernels.indexer import ref
from dsv4_kernels.tiles import tiles
from dsv4_kernels.tuned import default, options, tuned

WIDE_KEYS = 16  # entries of a program that scores, where they are float32
SIGN = tl.constexpr(-(1 << 31))


def top_indices(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> Tensor:
    fits = q.dtype in CACHED and weights.dtype == float32 and keys.dtype in (*CACHED, uint8) and visible.dtype == int64
    if not fits or not q.numel() or not len(keys):
        return ref.top_indices(q, weights, keys, visible, k)
    (t, heads, d), n = q.shape, len(keys)
    q, weights, keys, visible = dense(q), dense(weights), dense(keys), dense(visible)
    slots, wide = min(k, n), keys.dtype == float32
    q = q.float() if wide else q
    scoring, choosing = tuned("indexer.score", q.device), tuned("indexer.choose", q.device)
    tile = WIDE_KEYS if wide else scoring["keys"]
    chosen = alloc.empty((t, slots), int64, q.device)
    for rows in tiles(t, n):
        count = len(visible[rows])
        scores = alloc.empty((count, n), int32, q.device)
        shared = min(count, scoring["tokens"])
        _score[(triton.cdiv(n, tile), triton.cdiv(count, shared))](
            q[rows], weights[rows], keys, visible[rows], scores, count, n, heads, d, slots, shared,
            HEADS=padded(heads, 16), D=padded(d, 16), KEYS=tile, FORM=form(keys), ROUNDED=q.dtype == bfloat16, DOT=DOT,
            **options(scoring))
        _choose[(count,)](scores, visible[rows], chosen[rows], n, slots, SCAN=min(choosing["scan"], padded(n)),
                          **options(choosing))
    return chosen


@triton.jit(do_not_specialize=["t", "n", "slots", "shared"])
def _score(q: Pointer, weights: Pointer, keys: Pointer, visible: Pointer, scores: Pointer, t: int, n: int, heads: int, d: int,
           slots: int, shared: int, HEADS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, FORM: tl.constexpr,
           ROUNDED: tl.constexpr, DOT: tl.constexpr) -> None:
    """Of `shared` tokens for KEYS entries. Who sees no more entries than may be chosen needs no scores. ROUNDED: q is
    bfloat16."""
    entry, channel, head = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, D), tl.arange(0, HEADS)
    key = kept_index(keys, entry.to(tl.int64), entry < n, channel, d, FORM)
    for i in range(shared):
        token = tl.program_id(1) * shared + i
        if token < t:
            sees = tl.minimum(tl.load(visible + token), n)
            if (sees > slots) & (sees > tl.program_id(0) * KEYS):
                place = (token * heads + head).to(tl.int64)
                query = tl.load(q + place[:, None] * d + channel[None, :], (head < heads)[:, None] & (channel < d)[None, :], 0.0)
                met = tl.zeros((HEADS, KEYS), tl.float32)
                if ROUNDED:
                    met = tl.dot(query.to(DOT), tl.trans(key).to(DOT), met)
                else:
                    met = multiplied(query, tl.trans(key), met, FORM == 0, DOT)
                weight = tl.load(weights + place, head < heads, 0.0)
                total = tl.sum(tl.where(met < 0, 0.0, met) * weight[:, None], 0)  # NaN passes
                tl.store(scores + token.to(tl.int64) * n + entry, in_order(total), entry < sees)


@triton.jit(do_not_specialize=["n", "slots"])
def _choose(scores: Pointer, visible: Pointer, chosen: Pointer, n: int, slots: int, SCAN: tl.constexpr) -> None:
    """A token's greatest `slots` scores: the least of them digit by digit, then everyone's place by counting who comes before."""
    token = tl.program_id(0).to(tl.int64)
    sees = tl.minimum(tl.load(visible + token), n).to(tl.int32)
    to = chosen + token * slots
    lane = tl.arange(0, SCAN)
    if sees <= slots:
        for start in range(0, slots, SCAN):
            slot = start + lane
            tl.store(to + slot, tl.where(slot < sees, slot, -1).to(tl.int64), slot < slots)
    else:
        scores += token * n
        least, wanted = _kth(scores, sees, slots, SCAN)
        found, tied = 0, 0
        for start in range(0, sees, SCAN):
            score = tl.load(scores + start + lane, start + lane < sees, SIGN)
            tie = ((score == least) & (start + lane < sees)).to(tl.int32)
            before = tied + tl.cumsum(tie, 0) - tie
            take = ((score > least) | ((tie > 0) & (before < wanted))).to(tl.int32)
            slot = found + tl.cumsum(take, 0) - take
            tl.store(to + slot, (start + lane).to(tl.int64), take > 0)
            found += tl.sum(take, 0)
            tied += tl.sum(tie, 0)


@triton.jit
def _kth(scores: Pointer, count: int, k: int, SCAN: tl.constexpr) -> tuple[Block, Block]:
    """The k-th greatest of `count` scores, and how many scores that equal it belong to the first k."""
    lane, digit = tl.arange(0, SCAN), tl.arange(0, 256)
    prefix, wanted = 0, k  # of unsigned scores: the upper digits that are known
    for level in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, count, SCAN):
            score = tl.load(scores + start + lane, start + lane < count, 0) ^ SIGN
            same = start + lane < count
            if level > 0:
                same = same & ((score >> (32 - 8 * level)) == (prefix >> (32 - 8 * level)))
            counts += tl.histogram((score >> (24 - 8 * level)) & 255, 256, same)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # how many have a greater digit
        here = (above < wanted) & (above + counts >= wanted)  # true of one digit
        prefix = prefix | (tl.sum(tl.where(here, digit, 0), 0) << (24 - 8 * level))
        wanted -= tl.sum(tl.where(here, above, 0), 0)
    return prefix ^ SIGN, wanted


AHEAD = (
    Case(_score, "*bf16 *fp32 *u8 *i64 *i32 i32 i32 i32:16 i32:16 i32 i32",
         {"HEADS": 64, "D": 128, "KEYS": default("indexer.score")["keys"], "FORM": 2, "ROUNDED": True, "DOT": DOT}, warps=8),
    Case(_choose, "*i32 *i64 *i64 i32 i32", {"SCAN": default("indexer.choose")["scan"]}, warps=8),
)
