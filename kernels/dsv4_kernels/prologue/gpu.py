"""What lies between projections and attention in Triton: one launch for a decoded token, whose programs have jobs of their own.

The key is a program. A compressor whose token completes no group appends to `pending`, a piece of channels for each program. One
that completes a short group (ratio 4) is a single program: it pools all channels, brings `pending` up to date, and what it pooled
becomes a key without leaving its registers. A long group (ratio 128) is too much for one processor: its channels are dealt to
many programs, and a second launch keeps the entry, once in 128 tokens. Index queries are some rows for each program. More tokens,
and what the kernel does not read, take one launch after the other, as each operation has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor, bfloat16, complex64, float32

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.cache import gpu as cache
from dsv4_kernels.cache.gpu import NUMBERS, keep_key
from dsv4_kernels.compressor import gpu as compressor
from dsv4_kernels.compressor.gpu import append_pending, keep_pending, pooled
from dsv4_kernels.gpu import Block, Pointer, Together, dense, padded, warps
from dsv4_kernels.norm_rope import gpu as norm_rope
from dsv4_kernels.norm_rope.gpu import real
from dsv4_kernels.prologue import Compression, Keeping, Queries, Steps, one_by_one
from dsv4_kernels.rounding import gpu as rounding
from dsv4_kernels.rounding.gpu import turn_rows

WHOLE = 8192  # values, slots times channels, up to which one program pools a group
APPENDED = 1024  # channels of a program that appends
TURNED = 2048  # values of a program that turns queries
APPEND, POOL, POOL_AND_KEEP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_STEPS = Steps(cache, compressor, norm_rope, rounding)


class Job(NamedTuple):
    """Programs of a launch that do the same: how many, the values that each holds at once, what they are compiled for, and their
    arguments; and what they leave for a launch of its own, or for the caller."""

    programs: int
    values: int
    kind: tuple[Any, ...]
    given: tuple[Any, ...]
    out: Tensor | None = None


def attention_prologue(kv: Tensor, keys: Keeping, compressions: Sequence[Compression], queries: Queries | None, eps: float,
                       position: int, at: Tensor | None = None) -> Tensor | None:
    if len(kv) != 1 or not (compressions or queries) or not _fits(kv, keys, compressions, queries):
        return one_by_one(_STEPS, kv, keys, compressions, queries, eps, position, at)
    kind, given = _keeping(kv.shape[1], keys)
    key = Job(1, kind[3], kind, (dense(kv), *given))
    compressed, turning = [_compressing(each) for each in compressions], _turning(queries, kv)
    jobs = [key, *compressed, turning]
    _prologue[(sum(job.programs for job in jobs),)](
        key.given, tuple(job.given for job in compressed), turning.given, kv if at is None else at, position, eps,
        LIVE=at is not None, KEY=key.kind, COMPRESSORS=tuple((job.programs, *job.kind) for job in compressed),
        QUERIES=turning.kind, num_warps=warps(max(job.values for job in jobs)))
    for job, each in zip(compressed, compressions, strict=True):
        if job.out is not None and each.entries is not None:
            cache.keep_keys(job.out, each.entries.norm, eps, *each.entries[1:])
    return turning.out


def _fits(kv: Tensor, keys: Keeping, compressions: Sequence[Compression], queries: Queries | None) -> bool:
    if kv.dtype != float32 or not cache.fits(kv.shape[1], keys.norm, *keys[1:4]):
        return False
    if queries is not None and (queries.x.dtype != float32 or queries.turns.dtype != complex64 or not queries.x.numel()
                                or queries.x.shape[-1] != padded(queries.x.shape[-1])):
        return False
    return all(compressor.fits(*each[:4]) for each in compressions)


def _keeping(d: int, keys: Keeping) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """(ROUND, PLACED, FORM, WIDTH, BITS) and the arguments of a program that keeps a key of d values."""
    width, placed = cache.tile(d, keys.rounding), keys.row is not None
    return ((NUMBERS[keys.rounding], int(placed), cache.form(keys.to), width, width.bit_length() - 1),
            (dense(keys.norm), real(keys.turns), keys.to, keys.row if placed else keys.to, d, keys.turns.shape[1]))


def _compressing(given: Compression) -> Job:
    pending, entries, ratio = given.pending, given.entries, len(given.ape)
    halves = len(pending.kv) // ratio
    slots, d = padded(halves * ratio), pending.kv.shape[1] // halves
    inputs = dense(given.kv), dense(given.scores), dense(given.ape), *pending, ratio
    unkept, nothing = ((0,) * 5, (inputs[0],) * 4 + (d, 0)), inputs[0]
    if entries is None:
        width = min(padded(halves * d), APPENDED)
        return Job(triton.cdiv(halves * d, width), width, (0, halves, slots, width, unkept[0]), (*inputs, nothing, *unkept[1]))
    width = cache.tile(d, entries.rounding)
    if slots * width <= WHOLE and cache.fits(d, entries.norm, *entries[1:4]):
        kind, kept = _keeping(d, entries)
        return Job(1, slots * width, (2, halves, slots, width, kind), (*inputs, nothing, *kept))
    width, entry = compressor.channels(slots, d), alloc.empty((1, d), float32, given.kv.device)
    return Job(triton.cdiv(d, width), slots * width, (1, halves, slots, width, unkept[0]), (*inputs, entry, *unkept[1]), entry)


def _turning(queries: Queries | None, kv: Tensor) -> Job:
    if queries is None:
        return Job(0, 0, (0,) * 4, (kv,) * 3 + (0, 0))
    x, rounded = dense(queries.x), queries.rounding == "index"
    out, (_, heads, width) = alloc.empty(tuple(x.shape), bfloat16 if rounded else float32, x.device), x.shape
    rows = min(padded(heads), max(1, TURNED // width))
    return Job(triton.cdiv(heads, rows), rows * width, (rows, int(rounded), width, width.bit_length() - 1),
               (x, real(queries.turns), out, heads, queries.turns.shape[1]), out)


@triton.jit(do_not_specialize=["position"])
def _prologue(key: Together, compressors: Together, queries: Together, at: Pointer, position: int, eps: float,
              LIVE: tl.constexpr, KEY: tl.constexpr, COMPRESSORS: tl.constexpr, QUERIES: tl.constexpr) -> None:
    """The key's program, those of each compressor, those of the queries. LIVE: the token's position is read from `at`. KEY:
    (ROUND, PLACED, FORM, WIDTH, BITS) of `keep_key`; COMPRESSORS: of each (programs, what they do, HALVES, SLOTS, WIDTH, and as
    KEY of its entries); QUERIES: (ROWS, ROUND, WIDTH, BITS) of `turn_rows`, no rows where there are no queries."""
    program = tl.program_id(0)
    if LIVE:
        position = tl.load(at)
    if program == 0:
        x, norm, angles, to, row, d, pairs = key
        channel = tl.arange(0, KEY[3])
        value = tl.load(x + channel, channel < d, 0.0)
        _keep_one(value, norm, angles, to, row, d, pairs, eps, KEY[0], KEY[1], KEY[2], KEY[3], KEY[4])
    program -= 1
    for each in tl.static_range(len(COMPRESSORS)):
        if (program >= 0) & (program < COMPRESSORS[each][0]):
            _compress_one(compressors[each], program, position, eps, COMPRESSORS[each][1], COMPRESSORS[each][2],
                          COMPRESSORS[each][3], COMPRESSORS[each][4], COMPRESSORS[each][5])
        program -= COMPRESSORS[each][0]
    if QUERIES[0] > 0:
        x, angles, out, heads, pairs = queries
        if program >= 0:
            row = program.to(tl.int64) * QUERIES[0] + tl.arange(0, QUERIES[0])[:, None]
            turn_rows(x, angles, out, row, heads, heads, pairs, True, QUERIES[1], QUERIES[1], QUERIES[0], QUERIES[2], QUERIES[3])


@triton.jit
def _keep_one(value: Block, norm: Pointer, angles: Pointer, to: Pointer, row: Pointer, d: int, pairs: int, eps: float,
              ROUND: tl.constexpr, PLACED: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    """value [WIDTH] becomes the only row of `to`, or if PLACED the one that `row` names as it is when the kernel runs."""
    if PLACED:
        keep_key(value, norm, angles, to, tl.load(row), d, pairs, eps, ROUND, FORM, WIDTH, BITS)
    else:
        keep_key(value, norm, angles, to, 0, d, pairs, eps, ROUND, FORM, WIDTH, BITS)


@triton.jit
def _compress_one(given: Together, program: int, position: Block, eps: float, TASK: tl.constexpr, HALVES: tl.constexpr,
                  SLOTS: tl.constexpr, WIDTH: tl.constexpr, KEY: tl.constexpr) -> None:
    """WIDTH channels of a compressor that takes the token."""
    kv, scores, ape, pending_kv, pending_scores, ratio, entry, norm, angles, to, row, d, pairs = given
    filled, first, channel = (position % ratio).to(tl.int32), program * WIDTH, tl.arange(0, WIDTH)
    if TASK == APPEND:
        append_pending(kv, scores, ape, pending_kv, pending_scores, first, filled, ratio, d, HALVES, WIDTH)
    else:
        value = pooled(kv, scores, ape, pending_kv, pending_scores, 0, first, filled, ratio, d, HALVES, SLOTS, WIDTH)
        keep_pending(kv, scores, ape, pending_kv, pending_scores, first, 1, filled, 1, ratio, d, HALVES, SLOTS, WIDTH)
        if TASK == POOL:
            tl.store(entry + first + channel, value, first + channel < d)
        else:
            value = tl.where(channel < d, value, 0.0)
            _keep_one(value, norm, angles, to, row, d, pairs, eps, KEY[0], KEY[1], KEY[2], WIDTH, KEY[4])


def _cases() -> tuple[Case, ...]:
    """Of Flash: a token that completes nothing, one that completes a group of four, both with queries, and one that completes a
    group of 128."""
    kept, at = "*fp32 *fp32 *u8 *i64 i32:16 i32:16", "*i64 i32 fp32"
    compressor = f"(*fp32 *fp32 *fp32 *fp32 *fp32 i32 *fp32 {kept})"
    key, entry, index = ((NUMBERS["kv"], 1, 2, 512, 9),) * 2 + ((NUMBERS["index"], 1, 2, 128, 7),)
    queries, none = (16, 1, 128, 7), (0,) * 4
    unkept = (0,) * 5
    four = f"(*fp32 {kept}) ({compressor} {compressor}) (*fp32 *fp32 *bf16 i32:16 i32:16) {at}"
    long = f"(*fp32 {kept}) ({compressor.replace('i32 ', 'i32:16 ', 1)}) (*fp32 *fp32 *bf16 i32:16 i32:16) {at}"
    return tuple(
        Case(_prologue, types, {"LIVE": True, "KEY": key, "COMPRESSORS": compressors, "QUERIES": turning}, warps=number)
        for types, compressors, turning, number in (
            (four, ((1, 0, 2, 8, 1024, unkept), (1, 0, 2, 8, 256, unkept)), queries, 4),
            (four, ((1, 2, 2, 8, 512, entry), (1, 2, 2, 8, 128, index)), queries, 8),
            (long, ((64, 1, 1, 128, 8, unkept),), none, 2)))


AHEAD = _cases()
