"""RMS norm and rotation in Triton. Tensors other than float32 (turns: complex64) go the way of `ref`.

A program owns some rows, and a row lies in one tile. Frequencies are computed once, so they stay in torch. Sines and cosines are
the libraries' exact ones, whose angles may be as great as positions are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, complex64, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, padded, warps
from dsv4_kernels.norm_rope import Entry, Placed, ref

TILE = 2048  # values of a program that owns more than one row
ANGLES = 512  # of a program; to reduce a great angle takes a thread many registers

frequencies = ref.frequencies


def turns(positions: Tensor, freqs: Tensor) -> Tensor:
    if positions.dtype != int64 or freqs.dtype != float32 or not len(positions):
        return ref.turns(positions, freqs)
    t, pairs = len(positions), len(freqs)
    out, rows = alloc.empty((t, pairs, 2), float32, positions.device), min(padded(t), max(1, ANGLES // padded(pairs)))
    _turns[(triton.cdiv(t, rows),)](dense(positions), dense(freqs), out, t, pairs, ROWS=rows, PAIRS=padded(pairs))
    return torch.view_as_complex(out)


def place_token(at: Tensor, window_freqs: Tensor, compress_freqs: Tensor, window: int, ratios: Sequence[int]) -> Placed:
    if at.dtype != int64 or not window_freqs.dtype == compress_freqs.dtype == float32:
        return ref.place_token(at, window_freqs, compress_freqs, window, ratios)
    pairs, programs = len(window_freqs), 2 + len(ratios)
    tables = alloc.empty((programs, pairs, 2), float32, at.device)
    numbers = alloc.empty((programs, 2, 2), int64, at.device)  # each in 16 bytes of its own, as kernels like addresses
    _place[(programs,)](at, dense(window_freqs), dense(compress_freqs), tables, numbers, window, pairs, RATIOS=tuple(ratios),
                        PAIRS=padded(pairs), num_warps=1)
    angles = torch.view_as_complex(tables)
    entries = (Entry(numbers[each, 0, :1], numbers[each, 1, :1], angles[each:each + 1]) for each in range(2, programs))
    return Placed(angles[:1], angles[1:2], numbers[0, 0, :1], tuple(entries))


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
def _turns(positions: Pointer, freqs: Pointer, out: Pointer, t: int, pairs: int, ROWS: tl.constexpr, PAIRS: tl.constexpr) -> None:
    token, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, PAIRS)[None, :]
    position, inside = tl.load(positions + token, token < t, 0), (token < t) & (pair < pairs)
    _store_turns(position, tl.load(freqs + pair, pair < pairs, 0.0), out + (token.to(tl.int64) * pairs + pair) * 2, inside)


@triton.jit
def _store_turns(position: Block, freqs: Block, to: Pointer, inside: Block) -> None:
    angle = position.to(tl.float32) * freqs
    tl.store(to, tl.cos(angle), inside)
    tl.store(to + 1, tl.sin(angle), inside)


@triton.jit
def _place(at: Pointer, near: Pointer, far: Pointer, tables: Pointer, numbers: Pointer, window: int, pairs: int,
           RATIOS: tl.constexpr, PAIRS: tl.constexpr) -> None:
    """The first program: turns where nothing is compressed, and the row of a ring; the second: turns where something is; then one
    for each ratio. tables [programs, pairs, 2], numbers [programs, 2, 2]."""
    program, pair = tl.program_id(0), tl.arange(0, PAIRS)
    position = tl.load(at)
    first, freqs = position, tl.load(far + pair, pair < pairs, 0.0)
    if program == 0:
        freqs = tl.load(near + pair, pair < pairs, 0.0)
        tl.store(numbers, position % window)
    for each in tl.static_range(len(RATIOS)):
        if program == each + 2:
            first = position // RATIOS[each] * RATIOS[each]
            tl.store(numbers + program * 4, (position + 1) // RATIOS[each])
            tl.store(numbers + program * 4 + 2, position // RATIOS[each])
    _store_turns(first, freqs, tables + (program * pairs + pair) * 2, pair < pairs)


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


AHEAD = (
    Case(_turns, "*i64 *fp32 *fp32 i32 i32:16", {"ROWS": 16, "PAIRS": 32}),
    Case(_place, "*i64 *fp32 *fp32 *fp32 *i64 i32:16 i32:16", {"RATIOS": (4, 128), "PAIRS": 32}, warps=1),
    Case(_norm, "*fp32 *fp32 *fp32 i32 i32:16 fp32", {"WEIGHTED": True, "ROWS": 1, "WIDTH": 4096}, warps=8),
    Case(_rotate, "*fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16", {"INVERSE": True, "ROWS": 4, "STILL": 512, "PAIRS": 32}),
)
