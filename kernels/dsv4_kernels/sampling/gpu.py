"""Sampling in Triton; only the chosen id is ever read by the host.

Programs own pieces of the vocabulary: they make scores and find the greatest, then chances, whose sums are whole numbers; one
program finds the piece and the token that the draw points at. With top-k or top-p one program looks for the score at which they
cut, two bits at a time, which is a pass over the vocabulary for each two bits: no sorting, and ties are cut by id.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, in_order, padded
from dsv4_kernels.sampling import UNIT, Filters, ref

PIECE = 1024  # tokens of a program; the vocabulary's pieces are looked at together, so they should be few hundred
TILE = 4096  # tokens that the program which cuts looks at together


def sample(logits: Tensor, marks: Tensor, filters: Filters, draw: int) -> Tensor:
    n, device = len(logits), logits.device
    if logits.dtype != float32 or not 0 < n < 1 << 24:
        return ref.sample(logits, marks, filters, draw)
    logits, marks, pieces = dense(logits), dense(marks), triton.cdiv(n, PIECE)
    scores, best = alloc.empty((n,), float32, device), alloc.empty((pieces,), int64, device)
    chosen, cut = alloc.empty((1,), int64, device), alloc.empty((2,), int64, device)
    _prepare[(pieces,)](logits, marks, scores, best, n, filters.penalty, PIECE=PIECE)
    if filters.temperature == 0:
        _first[(1,)](best, chosen, pieces, PIECES=padded(pieces))
        return chosen
    chances, sums = alloc.empty((n,), int64, device), alloc.empty((pieces,), int64, device)
    _weigh[(pieces,)](scores, best, chances, sums, n, pieces, filters.temperature, PIECE=PIECE, PIECES=padded(pieces), UNIT=UNIT)
    count, by_mass = filters.top_k if 0 < filters.top_k < n else 0, filters.top_p < 1
    if count or by_mass:
        _cut[(1,)](scores, chances, cut, n, count, filters.top_p, COUNTED=count > 0, WEIGHED=by_mass,
                   TILE=min(TILE, padded(n)), num_warps=16)
    if count or by_mass or filters.min_p > 0:
        _filter[(pieces,)](scores, chances, sums, cut, n, filters.min_p, CUT=bool(count or by_mass), PIECE=PIECE, UNIT=UNIT)
    _draw[(1,)](best, chances, sums, chosen, n, pieces, draw >> 27, draw & (1 << 27) - 1, PIECE=PIECE, PIECES=padded(pieces))
    return chosen


@triton.jit
def _key(scores: Block) -> Block:
    """int64, from 0 on, that compare as the scores do."""
    return in_order(scores).to(tl.int64) + (1 << 31)


@triton.jit
def _prepare(logits: Pointer, marks: Pointer, scores: Pointer, best: Pointer, n: int, penalty: float,
             PIECE: tl.constexpr) -> None:
    """best: of each piece the greatest key and, of equal ones, the first id: key * 2^24 + (2^24 - 1 - id)."""
    token = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    there = token < n
    mark, logit = tl.load(marks + token, there, 2).to(tl.int32), tl.load(logits + token, there, float("-inf"))
    weaker = tl.where(logit > 0, tl.div_rn(logit, tl.zeros_like(logit) + penalty), logit * penalty)
    score = tl.where((mark & 1) != 0, weaker, logit)
    score = tl.where(((mark & 2) != 0) & (logit == logit), float("-inf"), score)  # what is no number is told, banned or not
    tl.store(scores + token, score, there)
    order = _key(score) * (1 << 24) + ((1 << 24) - 1 - token)
    tl.store(best + tl.program_id(0), tl.max(tl.where(there, order, -1), 0))


@triton.jit
def _greatest(best: Pointer, pieces: int, PIECES: tl.constexpr) -> tuple[Block, Block, Block]:
    """(score, id, whether it is a finite number) of the first of the greatest scores."""
    piece = tl.arange(0, PIECES)
    order = tl.max(tl.load(best + piece, piece < pieces, -1), 0)
    bits = ((order >> 24) - (1 << 31)).to(tl.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    sound = (bits & 0x7F800000) != 0x7F800000
    return bits.to(tl.float32, bitcast=True), (1 << 24) - 1 - (order & ((1 << 24) - 1)), sound


@triton.jit
def _first(best: Pointer, chosen: Pointer, pieces: int, PIECES: tl.constexpr) -> None:
    _, token, sound = _greatest(best, pieces, PIECES)
    tl.store(chosen, tl.where(sound, token, -1))


@triton.jit
def _weigh(scores: Pointer, best: Pointer, chances: Pointer, sums: Pointer, n: int, pieces: int, temperature: float,
           PIECE: tl.constexpr, PIECES: tl.constexpr, UNIT: tl.constexpr) -> None:
    greatest, _, sound = _greatest(best, pieces, PIECES)
    token = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    score = tl.load(scores + token, token < n, float("-inf"))
    score, greatest = tl.where(sound, score, float("-inf")).to(tl.float64), tl.where(sound, greatest, 0.0).to(tl.float64)
    chance = tl.exp((score - greatest) / tl.cast(temperature, tl.float64))
    chance = tl.floor(chance * (1 << UNIT) + 0.5).to(tl.int64)
    tl.store(chances + token, chance, token < n)
    tl.store(sums + tl.program_id(0), tl.sum(chance, 0))


@triton.jit
def _tile(scores: Pointer, chances: Pointer, first: int, n: int, BY_MASS: tl.constexpr,
          TILE: tl.constexpr) -> tuple[Block, Block, Block]:
    """(ids, keys, and what each counts: its chance, or one)."""
    token = first + tl.arange(0, TILE)
    key = tl.where(token < n, _key(tl.load(scores + token, token < n, 0.0)), -1)
    if BY_MASS:
        value = tl.load(chances + token, token < n, 0)
    else:
        value = (token < n).to(tl.int64)
    return token, key, value


@triton.jit
def _edge(scores: Pointer, chances: Pointer, n: int, needed: Block, BY_MASS: tl.constexpr,
          TILE: tl.constexpr) -> tuple[Block, Block]:
    """(key, id) of the last token of the likeliest that together count `needed`; of equal keys the lower ids come first."""
    edge = needed * 0
    for step in range(16):
        unit = (needed * 0 + 1) << (30 - 2 * step)
        one, two = tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int64)
        three = tl.zeros((TILE,), tl.int64)
        for first in range(0, n, TILE):
            _, key, value = _tile(scores, chances, first, n, BY_MASS, TILE)
            one += tl.where(key >= edge + unit, value, 0)
            two += tl.where(key >= edge + 2 * unit, value, 0)
            three += tl.where(key >= edge + 3 * unit, value, 0)
        one, two, three = tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)
        edge += unit * ((one >= needed).to(tl.int64) + (two >= needed).to(tl.int64) + (three >= needed).to(tl.int64))
    above = tl.zeros((TILE,), tl.int64)
    for first in range(0, n, TILE):
        _, key, value = _tile(scores, chances, first, n, BY_MASS, TILE)
        above += tl.where(key > edge, value, 0)
    left, last = needed - tl.sum(above, 0), needed * 0 - 1
    for first in range(0, n, TILE):
        token, key, value = _tile(scores, chances, first, n, BY_MASS, TILE)
        value = tl.where(key == edge, value, 0)
        fits = (key == edge) & (tl.cumsum(value, 0) - value < left)
        last = tl.maximum(last, tl.max(tl.where(fits, token, -1), 0).to(tl.int64))
        left -= tl.sum(value, 0)
    return edge, last


@triton.jit(do_not_specialize=["count"])
def _cut(scores: Pointer, chances: Pointer, cut: Pointer, n: int, count: int, top_p: float, COUNTED: tl.constexpr,
         WEIGHED: tl.constexpr, TILE: tl.constexpr) -> None:
    """Where top-k cuts, or top-p what it leaves: that cut is never lower, since it needs no more than there is."""
    if COUNTED:
        edge, last = _edge(scores, chances, n, tl.cast(count, tl.int64), False, TILE)
        tl.store(cut, edge)
        tl.store(cut + 1, last)
    if WEIGHED:
        total = tl.zeros((TILE,), tl.int64)
        for first in range(0, n, TILE):
            token, key, value = _tile(scores, chances, first, n, True, TILE)
            if COUNTED:
                value = tl.where((key > edge) | ((key == edge) & (token <= last)), value, 0)
            total += value
        needed = tl.ceil(tl.cast(top_p, tl.float64) * tl.sum(total, 0).to(tl.float64)).to(tl.int64)
        edge, last = _edge(scores, chances, n, tl.maximum(needed, 1), True, TILE)
        tl.store(cut, edge)
        tl.store(cut + 1, last)


@triton.jit
def _filter(scores: Pointer, chances: Pointer, sums: Pointer, cut: Pointer, n: int, min_p: float, CUT: tl.constexpr,
            PIECE: tl.constexpr, UNIT: tl.constexpr) -> None:
    token, key, chance = _tile(scores, chances, tl.program_id(0) * PIECE, n, True, PIECE)
    chance = tl.where(chance.to(tl.float64) >= tl.cast(min_p, tl.float64) * (1 << UNIT), chance, 0)
    if CUT:
        edge, last = tl.load(cut), tl.load(cut + 1)
        chance = tl.where((key > edge) | ((key == edge) & (token <= last)), chance, 0)
    tl.store(chances + token, chance, token < n)
    tl.store(sums + tl.program_id(0), tl.sum(chance, 0))


@triton.jit(do_not_specialize=["high", "low"])
def _draw(best: Pointer, chances: Pointer, sums: Pointer, chosen: Pointer, n: int, pieces: int, high: int, low: int,
          PIECE: tl.constexpr, PIECES: tl.constexpr) -> None:
    """The number drawn is high * 2^27 + low, of 53 bits."""
    _, _, sound = _greatest(best, pieces, PIECES)
    piece, place = tl.arange(0, PIECES), tl.arange(0, PIECE)
    part = tl.load(sums + piece, piece < pieces, 0)
    total = tl.sum(part, 0)
    share = (tl.cast(high, tl.int64) * (1 << 27) + low).to(tl.float64) * (1.0 / (1 << 53))
    aim = tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)
    number = tl.sum(((tl.cumsum(part, 0) <= aim) & (piece < pieces)).to(tl.int32), 0)
    behind = tl.sum(tl.where(piece < number, part, 0), 0)
    token = number * PIECE + place
    behind += tl.cumsum(tl.load(chances + token, token < n, 0), 0)
    token = number * PIECE + tl.sum((behind <= aim).to(tl.int32), 0)
    tl.store(chosen, tl.where(sound, token, -1).to(tl.int64))


AHEAD = (
    Case(_prepare, "*fp32 *u8 *fp32 *i64 i32:16 fp32", {"PIECE": 1024}),
    Case(_first, "*i64 *i64 i32", {"PIECES": 128}),
    Case(_weigh, "*fp32 *i64 *i64 *i64 i32:16 i32 fp32", {"PIECE": 1024, "PIECES": 128, "UNIT": 40}),
    Case(_cut, "*fp32 *i64 *i64 i32:16 i32 fp32", {"COUNTED": True, "WEIGHED": True, "TILE": 4096}, warps=16),
    Case(_filter, "*fp32 *i64 *i64 *i64 i32:16 fp32", {"CUT": True, "PIECE": 1024, "UNIT": 40}),
    Case(_draw, "*i64 *i64 *i64 *i64 i32:16 i32 i32 i32", {"PIECE": 1024, "PIECES": 128}),
)
