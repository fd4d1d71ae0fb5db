"""Keeping rows on the card. Keys are made and kept in one launch; rows as they are by torch's own copy, which is one too and
rounds as it should.

A program owns a key. Tensors other than float32 (turns: complex64), caches that are neither float32 nor bfloat16, odd widths,
and in the indexer those that are no power of two, go the way of `ref`.
"""

from __future__ import annotations

from typing import get_args

import triton
import triton.language as tl
from torch import Tensor, complex64, float32

from dsv4_kernels.ahead import Case
from dsv4_kernels.cache import Rounding, ref
from dsv4_kernels.gpu import CACHED, Block, Pointer, dense, padded, to_bf16, warps
from dsv4_kernels.norm_rope.gpu import real
from dsv4_kernels.rounding import KV_BLOCK
from dsv4_kernels.rounding.gpu import INDEX, KV, rounded_fp4, rounded_fp8, turned

keep = ref.keep

NUMBERS = {name: number for number, name in enumerate(get_args(Rounding))}
ROUND_KV, ROUND_INDEX = tl.constexpr(NUMBERS["kv"]), tl.constexpr(NUMBERS["index"])


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor,
              row: Tensor | None = None) -> None:
    (t, d), pairs = x.shape, turns.shape[1]
    fits = x.dtype == norm.dtype == float32 and turns.dtype == complex64 and to.dtype in CACHED and to.is_contiguous()
    if not fits or not t or d % 2 or (rounding == "index" and d != padded(d)):
        ref.keep_keys(x, norm, eps, turns, rounding, to, row)
        return
    width = padded(d, KV_BLOCK if rounding == "kv" else 2)  # whole blocks
    _keep_keys[(t,)](dense(x), dense(norm), real(turns), to, to if row is None else row, d, pairs, eps, ROUND=NUMBERS[rounding],
                     PLACED=row is not None, NARROW=to.dtype != float32, WIDTH=width, BITS=width.bit_length() - 1,
                     num_warps=warps(width))



@triton.jit
def _keep_keys(x: Pointer, norm: Pointer, angles: Pointer, to: Pointer, place: Pointer, d: int, pairs: int, eps: float,
               ROUND: tl.constexpr, PLACED: tl.constexpr, NARROW: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    """Row `token` of `to`; if PLACED the one that `place` names, as it is when the kernel runs."""
    token, channel = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    value = tl.load(x + token * d + channel, channel < d, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / d + eps)
    value *= tl.load(norm + channel, channel < d, 0.0)
    value = _turned_tail(value, angles + token * pairs * 2, d, pairs, WIDTH)
    if ROUND == ROUND_KV:
        blocks = tl.reshape(value, (WIDTH // KV, KV))
        still = (tl.arange(0, WIDTH // KV) * KV < d - 2 * pairs)[:, None]  # blocks are turned whole or not at all
        value = tl.reshape(tl.where(still, rounded_fp8(blocks), to_bf16(blocks)), (WIDTH,))
    if ROUND == ROUND_INDEX:
        spread = turned(tl.reshape(value, (1, WIDTH)), 1, WIDTH, BITS)
        value = tl.reshape(rounded_fp4(tl.reshape(spread, (WIDTH // INDEX, INDEX))), (WIDTH,))
    if NARROW:
        value = to_bf16(value)
    row = token
    if PLACED:
        row = tl.load(place)
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


AHEAD = (
    Case(_keep_keys, "*fp32 *fp32 *fp32 *bf16 *i64 i32:16 i32:16 fp32",
         {"ROUND": NUMBERS["kv"], "PLACED": True, "NARROW": True, "WIDTH": 512, "BITS": 9}, warps=1),
    Case(_keep_keys, "*fp32 *fp32 *fp32 *bf16 *i64 i32:16 i32:16 fp32",
         {"ROUND": NUMBERS["index"], "PLACED": True, "NARROW": True, "WIDTH": 128, "BITS": 7}, warps=1),
)
