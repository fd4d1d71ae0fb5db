"""Keys on the card: made and kept in one launch, packed or not, and read back by the kernels of other operations. Rows that are
kept as they are go by torch's own copy, which is one launch too and rounds as it should.

A program owns a key. Tensors other than float32 (turns: complex64), caches of other types than float32, bfloat16 and uint8, odd
widths, and in the indexer those that are no power of two, go the way of `ref`.
"""

from __future__ import annotations

from typing import get_args

import triton
import triton.language as tl
from torch import Tensor, complex64, float32, uint8

from dsv4_kernels.ahead import Case
from dsv4_kernels.cache import Rounding, ref
from dsv4_kernels.gpu import CACHED, Block, Pointer, dense, padded, to_bf16, warps
from dsv4_kernels.norm_rope.gpu import real
from dsv4_kernels.rounding import KV_BLOCK
from dsv4_kernels.rounding.gpu import INDEX, KV, codes_fp4, codes_fp8, of_fp4, of_fp8, rounded_fp4, rounded_fp8, turned

keep = ref.keep

NUMBERS = {name: number for number, name in enumerate(get_args(Rounding))}
ROUND_KV, ROUND_INDEX = tl.constexpr(NUMBERS["kv"]), tl.constexpr(NUMBERS["index"])
AS_FLOAT32, AS_BF16, PACKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def form(rows: Tensor) -> int:
    """How a cache keeps its keys: AS_FLOAT32, AS_BF16 or PACKED."""
    return 2 if rows.dtype == uint8 else int(rows.dtype != float32)


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor,
              row: Tensor | None = None) -> None:
    if x.dtype != float32 or not len(x) or not fits(x.shape[1], norm, turns, rounding, to):
        ref.keep_keys(x, norm, eps, turns, rounding, to, row)
        return
    (t, d), width = x.shape, tile(x.shape[1], rounding)
    _keep_keys[(t,)](dense(x), dense(norm), real(turns), to, to if row is None else row, d, turns.shape[1], eps,
                     ROUND=NUMBERS[rounding], PLACED=row is not None, FORM=form(to), WIDTH=width, BITS=width.bit_length() - 1,
                     num_warps=warps(width))


def fits(d: int, norm: Tensor, turns: Tensor, rounding: Rounding, to: Tensor) -> bool:
    """Whether `keep_key` makes such keys of float32 vectors."""
    known = norm.dtype == float32 and turns.dtype == complex64 and to.dtype in (*CACHED, uint8) and to.is_contiguous()
    return known and not d % 2 and (rounding != "index" or d == padded(d))


def tile(d: int, rounding: Rounding) -> int:
    """Values of a program that keeps a key of d: whole blocks."""
    return padded(d, KV_BLOCK if rounding == "kv" else 2)


@triton.jit
def _keep_keys(x: Pointer, norm: Pointer, angles: Pointer, to: Pointer, place: Pointer, d: int, pairs: int, eps: float,
               ROUND: tl.constexpr, PLACED: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    """Row `token` of `to`; if PLACED the one that `place` names, as it is when the kernel runs."""
    token, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    row = token
    if PLACED:
        row = tl.load(place)
    value = tl.load(x + token * d + channel, channel < d, 0.0)
    keep_key(value, norm, angles + token * pairs * 2, to, row, d, pairs, eps, ROUND, FORM, WIDTH, BITS)


@triton.jit
def keep_key(value: Block, norm: Pointer, angles: Pointer, to: Pointer, row: Block, d: int, pairs: int, eps: float,
             ROUND: tl.constexpr, FORM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    """value [WIDTH], zeros behind d, becomes row `row` of `to`: normed, turned by what lies at `angles`, rounded, written."""
    channel = tl.arange(0, WIDTH)
    value *= tl.rsqrt(tl.sum(value * value, 0) / d + eps)
    value *= tl.load(norm + channel, channel < d, 0.0)
    value = _turned_tail(value, angles, d, pairs, WIDTH)
    if ROUND == ROUND_INDEX:
        value = tl.reshape(turned(tl.reshape(value, (1, WIDTH)), 1, WIDTH, BITS), (WIDTH,))
    if FORM == PACKED and ROUND == ROUND_KV:
        _pack_kv(value, to, row, d, d - 2 * pairs, WIDTH)
    elif FORM == PACKED:
        _pack_index(value, to, row, WIDTH)
    else:
        if ROUND == ROUND_KV:
            blocks = tl.reshape(value, (WIDTH // KV, KV))
            still = (tl.arange(0, WIDTH // KV) * KV < d - 2 * pairs)[:, None]  # blocks are turned whole or not at all
            value = tl.reshape(tl.where(still, rounded_fp8(blocks), to_bf16(blocks)), (WIDTH,))
        if ROUND == ROUND_INDEX:
            value = tl.reshape(rounded_fp4(tl.reshape(value, (WIDTH // INDEX, INDEX))), (WIDTH,))
        if FORM == AS_BF16:
            value = to_bf16(value)
        tl.store(to + row * d + channel, value.to(to.dtype.element_ty), channel < d)


@triton.jit
def _turned_tail(value: Block, angles: Pointer, d: int, pairs: int, WIDTH: tl.constexpr) -> Block:
    """value [WIDTH], whose last 2 * pairs of d values are turned as adjacent pairs."""
    pair = tl.arange(0, WIDTH // 2)
    first = d // 2 - pairs
    turning = (pair >= first) & (pair < d // 2)
    cosine = tl.load(angles + (pair - first) * 2, turning, 1.0)
    sine = tl.load(angles + (pair - first) * 2 + 1, turning, 0.0)
    even, odd = tl.split(tl.reshape(value, (WIDTH // 2, 2)))
    # what is not turned passes as it is: an infinity times a sine of zero would be no number
    one = tl.where(turning, even * cosine - odd * sine, even)
    other = tl.where(turning, even * sine + odd * cosine, odd)
    return tl.reshape(tl.join(one, other), (WIDTH,))


@triton.jit
def _pack_kv(value: Block, to: Pointer, row: Block, d: int, still: int, WIDTH: tl.constexpr) -> None:
    """A row of bytes: codes, scales, and the turned values as bf16, lower byte first."""
    blocks = still // KV
    to += row * (still + blocks + 2 * (d - still))
    code, scale = codes_fp8(tl.reshape(value, (WIDTH // KV, KV)))
    block, channel = tl.arange(0, WIDTH // KV)[:, None], tl.arange(0, WIDTH)
    place = block * KV + tl.arange(0, KV)[None, :]
    tl.store(to + place, code.to(tl.uint8), place < still)
    tl.store(to + still + block, scale.to(tl.uint8), block < blocks)
    bits = (to_bf16(value).to(tl.int32, bitcast=True) >> 16) & 65535
    tail, inside = still + blocks + 2 * (channel - still), (channel >= still) & (channel < d)
    tl.store(to + tail, (bits & 255).to(tl.uint8), inside)
    tl.store(to + tail + 1, (bits >> 8).to(tl.uint8), inside)


@triton.jit
def _pack_index(value: Block, to: Pointer, row: Block, WIDTH: tl.constexpr) -> None:
    """A row of bytes: two neighbours' codes in each, the first in the lower half, then scales."""
    to += row * (WIDTH // 2 + WIDTH // INDEX)
    code, scale = codes_fp4(tl.reshape(value, (WIDTH // INDEX, INDEX)))
    low, high = tl.split(tl.reshape(code, (WIDTH // 2, 2)))
    tl.store(to + tl.arange(0, WIDTH // 2), (low | (high << 4)).to(tl.uint8))
    tl.store(to + WIDTH // 2 + tl.arange(0, WIDTH // INDEX)[:, None], scale.to(tl.uint8))


@triton.jit
def kept_keys(rows: Pointer, key: Block, seen: Block, channel: Block, d: int, still: int, FORM: tl.constexpr) -> Block:
    """Rows key [n], int64, of a cache of K=V as `_keep_keys` wrote them: [n, D] float32, or as they are if not packed; zeros
    where not `seen`. The first `still` of d channels are not turned."""
    inside = seen[:, None] & (channel < d)[None, :]
    if FORM == PACKED:
        blocks = still // KV
        row = rows + key[:, None] * (still + blocks + 2 * (d - still))
        coded, turning = inside & (channel < still)[None, :], inside & (channel >= still)[None, :]
        code = tl.load(row + channel[None, :], coded, 0).to(tl.int32)
        scale = tl.load(row + still + (channel // KV)[None, :], coded, 0).to(tl.int32)
        tail = row + still + blocks + 2 * (channel - still)[None, :]
        bits = tl.load(tail, turning, 0).to(tl.int32) | (tl.load(tail + 1, turning, 0).to(tl.int32) << 8)
        return tl.where(coded, of_fp8(code, scale), (bits << 16).to(tl.float32, bitcast=True))
    else:
        return tl.load(rows + key[:, None] * d + channel[None, :], inside, 0.0)


@triton.jit
def kept_index(rows: Pointer, key: Block, seen: Block, channel: Block, d: int, FORM: tl.constexpr) -> Block:
    """The same of a cache of index keys."""
    inside = seen[:, None] & (channel < d)[None, :]
    if FORM == PACKED:
        row = rows + key[:, None] * (d // 2 + d // INDEX)
        pair = tl.load(row + (channel // 2)[None, :], inside, 0).to(tl.int32)
        scale = tl.load(row + d // 2 + (channel // INDEX)[None, :], inside, 0).to(tl.int32)
        return of_fp4((pair >> (4 * (channel & 1))[None, :]) & 15, scale)
    else:
        return tl.load(rows + key[:, None] * d + channel[None, :], inside, 0.0)


AHEAD = (
    Case(_keep_keys, "*fp32 *fp32 *fp32 *u8 *i64 i32:16 i32:16 fp32",
         {"ROUND": NUMBERS["kv"], "PLACED": True, "FORM": 2, "WIDTH": 512, "BITS": 9}, warps=1),
    Case(_keep_keys, "*fp32 *fp32 *fp32 *u8 *i64 i32:16 i32:16 fp32",
         {"ROUND": NUMBERS["index"], "PLACED": True, "FORM": 2, "WIDTH": 128, "BITS": 7}, warps=1),
)
