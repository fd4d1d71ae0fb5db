"""Sampling in Triton; only the chosen id is ever read by the host.

Programs own pieces of the vocabulary: they make scores and find the greatest, then chances, whose sums are whole numbers; one
program finds the piece and the token that the draw points at. The score at which top-k or top-p cuts is found digit by digit, in
eight launches of four bits, in which every program counts how much of its piece has which digit: no sorting, nothing is added
atomically, and ties are cut by id, for the last counts say how many of them the pieces before have.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, in_order, padded
from dsv4_kernels.sampling import UNIT, Filters, ref
from dsv4_kernels.tuned import options, tuned

LEVELS = 8  # digits of a score's key
BITS, DIGITS = tl.constexpr(4), tl.constexpr(16)  # of a digit, and how many there are


def sample(logits: Tensor, marks: Tensor, filters: Filters, draw: int) -> Tensor:
    n, device = len(logits), logits.device
    if logits.dtype != float32 or not 0 < n < 1 << 24:
        return ref.sample(logits, marks, filters, draw)
    sizes = tuned("sampling.pieces", device)
    logits, marks, pieces = dense(logits), dense(marks), triton.cdiv(n, sizes["tokens"])
    shape = {"PIECE": sizes["tokens"], **options(sizes)}
    scores, best = alloc.empty((n,), float32, device), alloc.empty((pieces,), int64, device)
    chosen = alloc.empty((1,), int64, device)
    _prepare[(pieces,)](logits, marks, scores, best, n, filters.penalty, **shape)
    if filters.temperature == 0:
        _first[(1,)](best, chosen, pieces, PIECES=padded(pieces))
        return chosen
    chances, sums = alloc.empty((n,), int64, device), alloc.empty((pieces,), int64, device)
    _weigh[(pieces,)](scores, best, chances, sums, n, pieces, filters.temperature, PIECES=padded(pieces), UNIT=UNIT,
                      **shape)
    if 0 < filters.top_k < n:
        _keep(scores, chances, sums, filters.top_k, 1.0, shape)
    if filters.top_p < 1:
        _keep(scores, chances, sums, 0, filters.top_p, shape)
    if filters.min_p > 0:
        _filter[(pieces,)](scores, chances, sums, sums, sums, n, pieces, 0, filters.min_p, CUT=False, BY_MASS=True, LEVELS=LEVELS,
                           PIECES=padded(pieces), UNIT=UNIT, **shape)
    _draw[(1,)](best, chances, sums, chosen, n, pieces, draw >> 27, draw & (1 << 27) - 1, PIECES=padded(pieces),
                **shape)
    return chosen


def _keep(scores: Tensor, chances: Tensor, sums: Tensor, count: int, top_p: float, shape: dict[str, int]) -> None:
    """Chances become 0 but for the `count` likeliest tokens', or if count is 0 for those that reach a share top_p of the sum."""
    n, pieces, device = len(scores), len(sums), scores.device
    parts = alloc.empty((LEVELS, pieces, DIGITS.value), int64, device)
    path = alloc.empty((LEVELS, 2), int64, device)
    about = {"BY_MASS": count == 0, "PIECES": padded(pieces), **shape}
    for level in range(LEVELS):
        _digits[(pieces,)](scores, chances, sums, parts, path, n, pieces, count, top_p, level, **about)
    _filter[(pieces,)](scores, chances, sums, parts, path, n, pieces, count, 0.0, CUT=True, LEVELS=LEVELS, UNIT=UNIT, **about)


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
def _piece(scores: Pointer, chances: Pointer, first: int, n: int, BY_MASS: tl.constexpr,
           PIECE: tl.constexpr) -> tuple[Block, Block, Block]:
    """(ids, keys, and what each token counts: its chance, or one) of a piece that begins with token `first`."""
    token = first + tl.arange(0, PIECE)
    key = tl.where(token < n, _key(tl.load(scores + token, token < n, 0.0)), -1)
    if BY_MASS:
        value = tl.load(chances + token, token < n, 0)
    else:
        value = (token < n).to(tl.int64)
    return token, key, value


@triton.jit
def _reached(sums: Pointer, parts: Pointer, path: Pointer, pieces: int, level: int, count: int, top_p: float,
             BY_MASS: tl.constexpr, PIECES: tl.constexpr) -> tuple[Block, Block]:
    """(the first `level` digits of the key at which is cut, how much of what has these digits is kept)."""
    piece, digit = tl.arange(0, PIECES), tl.arange(0, DIGITS)
    if level == 0:
        prefix = tl.cast(level, tl.int64)
        needed = tl.cast(count, tl.int64)
        if BY_MASS:
            total = tl.sum(tl.load(sums + piece, piece < pieces, 0), 0)
            needed = tl.maximum(tl.ceil(tl.cast(top_p, tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
    else:
        before = path + 2 * (level - 1)
        prefix, needed = tl.load(before), tl.load(before + 1)
        row = (level - 1) * pieces + piece
        own = tl.sum(tl.load(parts + row[:, None] * DIGITS + digit[None, :], (piece < pieces)[:, None], 0), 0)
        above = tl.sum(own, 0) - tl.cumsum(own, 0)  # how much has a greater digit
        here = (above < needed) & (above + own >= needed)  # true of one digit
        prefix += tl.sum(tl.where(here, digit, 0), 0).to(tl.int64) << (32 - BITS * level)
        needed -= tl.sum(tl.where(here, above, 0), 0)
    return prefix, needed


@triton.jit(do_not_specialize=["count", "level"])
def _digits(scores: Pointer, chances: Pointer, sums: Pointer, parts: Pointer, path: Pointer, n: int, pieces: int, count: int,
            top_p: float, level: int, BY_MASS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr) -> None:
    """parts [levels, pieces, DIGITS]: of a piece's tokens whose key begins as the one at which is cut, how much has which digit
    next. path [levels, 2]: how that key begins, and how much of what begins so is kept."""
    prefix, needed = _reached(sums, parts, path, pieces, level, count, top_p, BY_MASS, PIECES)
    if tl.program_id(0) == 0:
        tl.store(path + 2 * level, prefix)
        tl.store(path + 2 * level + 1, needed)
    _, key, value = _piece(scores, chances, tl.program_id(0) * PIECE, n, BY_MASS, PIECE)
    shift = 32 - BITS * level
    value = tl.where((key >> shift) == (prefix >> shift), value, 0)
    own = (key >> (shift - BITS)) & (DIGITS - 1)
    to = parts + (level * pieces + tl.program_id(0)) * DIGITS
    for digit in range(DIGITS):
        tl.store(to + digit, tl.sum(tl.where(own == digit, value, 0), 0))


@triton.jit(do_not_specialize=["count"])
def _filter(scores: Pointer, chances: Pointer, sums: Pointer, parts: Pointer, path: Pointer, n: int, pieces: int, count: int,
            min_p: float, CUT: tl.constexpr, BY_MASS: tl.constexpr, LEVELS: tl.constexpr, PIECE: tl.constexpr,
            PIECES: tl.constexpr, UNIT: tl.constexpr) -> None:
    """What is beyond the cut if there is one, or less likely than min_p times the likeliest, becomes 0."""
    token, key, value = _piece(scores, chances, tl.program_id(0) * PIECE, n, BY_MASS, PIECE)
    chance = tl.load(chances + token, token < n, 0)
    chance = tl.where(chance.to(tl.float64) >= tl.cast(min_p, tl.float64) * (1 << UNIT), chance, 0)
    if CUT:
        edge, left = _reached(sums, parts, path, pieces, LEVELS, count, 1.0, BY_MASS, PIECES)
        piece = tl.arange(0, PIECES)
        equal = parts + ((LEVELS - 1) * pieces + piece) * DIGITS + (edge & (DIGITS - 1))
        tie = tl.where(key == edge, value, 0)
        before = tl.sum(tl.load(equal, piece < tl.program_id(0), 0), 0) + tl.cumsum(tie, 0) - tie
        chance = tl.where((key > edge) | ((key == edge) & (before < left)), chance, 0)
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
    Case(_digits, "*fp32 *i64 *i64 *i64 *i64 i32:16 i32 i32 fp32 i32", {"BY_MASS": True, "PIECE": 1024, "PIECES": 128}),
    Case(_digits, "*fp32 *i64 *i64 *i64 *i64 i32:16 i32 i32 fp32 i32", {"BY_MASS": False, "PIECE": 1024, "PIECES": 128}),
    Case(_filter, "*fp32 *i64 *i64 *i64 *i64 i32:16 i32 i32 fp32",
         {"CUT": True, "BY_MASS": True, "LEVELS": LEVELS, "PIECE": 1024, "PIECES": 128, "UNIT": 40}),
    Case(_draw, "*i64 *i64 *i64 *i64 i32:16 i32 i32 i32", {"PIECE": 1024, "PIECES": 128}),
)
