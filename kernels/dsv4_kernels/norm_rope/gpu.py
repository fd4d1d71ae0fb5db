"""RMS norm and rotation in Triton. Tensors other than float32 (turns: complex64) go the way of `ref`.

A program owns some rows, and a row lies in one tile. Frequencies and turns are computed once per forward pass or less, so they
stay in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, complex64, float32

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, padded, warps
from dsv4_kernels.norm_rope import ref

TILE = 2048  # values of a program that owns more than one row

frequencies = ref.frequencies
turns = ref.turns


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype != float32 or not x.numel() or (weight is not None and weight.dtype != float32):
        return ref.rms_norm(x, weight, eps)
    x = dense(x)
    out, d = alloc.empty_like(x), x.shape[-1]
    count, width = x.numel() // d, padded(d)
    rows = min(padded(count), max(1, TILE // width))
    _norm[(triton.cdiv(count, rows),)](x, x if weight is None else dense(weight), out, count, d, eps,
                                       WEIGHTED=weight is not None, ROWS=rows, WIDTH=width, num_warps=warps(rows * width))
    return out


def rotate(x: Tensor, turns: Tensor, inverse: bool) -> Tensor:
    if x.dtype != float32 or turns.dtype != complex64 or not x.numel():
        return ref.rotate(x, turns, inverse)
    x, angles = dense(x), real(turns)
    out, (t, d), pairs = alloc.empty_like(x), (x.shape[0], x.shape[-1]), turns.shape[1]
    count, still = x.numel() // d, padded(max(1, d - 2 * pairs))
    rows = min(padded(count), max(1, TILE // padded(d)))
    _rotate[(triton.cdiv(count, rows),)](x, angles, out, count, count // t, d, pairs, INVERSE=inverse, ROWS=rows, STILL=still,
                                         PAIRS=padded(pairs), num_warps=warps(rows * padded(d)))
    return out


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, turns: Tensor) -> Tensor:
    if x.dtype != float32 or turns.dtype != complex64 or not x.numel() or (weight is not None and weight.dtype != float32):
        return ref.norm_rotate(x, weight, eps, turns)
    x, angles = dense(x), real(turns)
    out, (t, d), pairs = alloc.empty_like(x), (x.shape[0], x.shape[-1]), turns.shape[1]
    count, width = x.numel() // d, padded(d)
    rows = min(padded(count), max(1, TILE // width))
    _norm_rotate[(triton.cdiv(count, rows),)](
        x, x if weight is None else dense(weight), angles, out, count, count // t, d, pairs, eps, WEIGHTED=weight is not None,
        ROWS=rows, WIDTH=width, PAIRS=padded(pairs), num_warps=warps(rows * width))
    return out


def real(turns: Tensor) -> Tensor:
    """complex64 [t, pairs] -> float32 [t, pairs, 2], cosine and sine."""
    return torch.view_as_real(dense(turns.resolve_conj()))


@triton.jit
def turn(even: Block, odd: Block, angles: Pointer, INVERSE: tl.constexpr, inside: Block) -> tuple[Block, Block]:
    """Pairs (even, odd) turned by the angle whose cosine and sine lie at `angles`, or back."""
    cosine, sine = tl.load(angles, inside, 0.0), tl.load(angles + 1, inside, 0.0)
    if INVERSE:
        sine = -sine
    return even * cosine - odd * sine, even * sine + odd * cosine


@triton.jit
def turned_with(x: Block, other: Block, angles: Pointer, channel: Block, d: int, still: int, INVERSE: tl.constexpr) -> Block:
    """x [.., D], whose channels from `still` on are turned as adjacent pairs, or back; other: the same of channel ^ 1, so that no
    value has to change places. angles: of the token's pairs, cosine and sine."""
    turning = (channel >= still) & (channel < d)
    place = (channel - still) // 2 * 2
    cosine, sine = tl.load(angles + place, turning, 1.0), tl.load(angles + place + 1, turning, 0.0)
    sine = tl.where(((channel & 1) == 1) != INVERSE, sine, -sine)
    if len(x.shape) == 2:
        cosine, sine, turning = cosine[None, :], sine[None, :], turning[None, :]
    return tl.where(turning, x * cosine + other * sine, x)


@triton.jit
def _norm(x: Pointer, weight: Pointer, out: Pointer, count: int, d: int, eps: float, WEIGHTED: tl.constexpr,
          ROWS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    inside = (row < count) & (place < d)
    values = tl.load(x + row * d + place, inside, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 1)[:, None] / d + eps)
    if WEIGHTED:
        values *= tl.load(weight + place, place < d, 0.0)
    tl.store(out + row * d + place, values, inside)


@triton.jit
def _rotate(x: Pointer, angles: Pointer, out: Pointer, count: int, heads: int, d: int, pairs: int, INVERSE: tl.constexpr,
            ROWS: tl.constexpr, STILL: tl.constexpr, PAIRS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, STILL)[None, :]
    inside = (row < count) & (place < d - 2 * pairs)
    tl.store(out + row * d + place, tl.load(x + row * d + place, inside, 0.0), inside)

    pair = tl.arange(0, PAIRS)[None, :]
    inside = (row < count) & (pair < pairs)
    even = row * d + d - 2 * pairs + 2 * pair
    one, other = tl.load(x + even, inside, 0.0), tl.load(x + even + 1, inside, 0.0)
    one, other = turn(one, other, angles + (row // heads * pairs + pair) * 2, INVERSE, inside)
    tl.store(out + even, one, inside)
    tl.store(out + even + 1, other, inside)


@triton.jit
def _norm_rotate(x: Pointer, weight: Pointer, angles: Pointer, out: Pointer, count: int, heads: int, d: int, pairs: int,
                 eps: float, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr) -> None:
    """Both. The values to turn are loaded once more, as pairs, from a cache that just had them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place, still = tl.arange(0, WIDTH)[None, :], d - 2 * pairs
    inside = (row < count) & (place < d)
    values = tl.load(x + row * d + place, inside, 0.0)
    factor = tl.rsqrt(tl.sum(values * values, 1)[:, None] / d + eps)
    values *= factor
    if WEIGHTED:
        values *= tl.load(weight + place, place < d, 0.0)
    tl.store(out + row * d + place, values, inside & (place < still))

    pair = tl.arange(0, PAIRS)[None, :]
    inside = (row < count) & (pair < pairs)
    even = still + 2 * pair
    one, other = tl.load(x + row * d + even, inside, 0.0) * factor, tl.load(x + row * d + even + 1, inside, 0.0) * factor
    if WEIGHTED:
        one *= tl.load(weight + even, pair < pairs, 0.0)
        other *= tl.load(weight + even + 1, pair < pairs, 0.0)
    one, other = turn(one, other, angles + (row // heads * pairs + pair) * 2, False, inside)
    tl.store(out + row * d + even, one, inside)
    tl.store(out + row * d + even + 1, other, inside)


AHEAD = (
    Case(_norm, "*fp32 *fp32 *fp32 i32 i32:16 fp32", {"WEIGHTED": True, "ROWS": 1, "WIDTH": 4096}, warps=8),
    Case(_rotate, "*fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16", {"INVERSE": True, "ROWS": 4, "STILL": 512, "PAIRS": 32}),
    Case(_norm_rotate, "*fp32 *fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16 fp32",
         {"WEIGHTED": False, "ROWS": 4, "WIDTH": 512, "PAIRS": 32}),
)
