"""Hyper-connections in Triton. Tensors other than float32 go the way of `ref`.

The mixture of a token is a product of all its streams with `fn`, 1.5 MB of weights in Flash: for a single token the width is
dealt to many programs, each of which leaves its part of the sums behind (no atomics), and whoever needs the mixture adds the
parts up in one order. What comes after it, Sinkhorn's rounds too, happens in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, padded, warps
from dsv4_kernels.hyper import HyperSettings, Mixer, ref

STEP = 128  # values of all streams that a program multiplies at a time
PARTS = 128  # into how many a token's sums are cut at most
FEW = 4  # up to so many tokens each has programs of its own; more share fn sixteen by sixteen
SPREAD = 512  # values of each stream that a program of `_spread` owns
WEIGHED = 1024  # and of `_mix`


def mix_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, norm: Tensor | None = None,
                sums: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if not _fit(streams, *mixer, norm) or not streams.numel():
        return ref.mix_streams(streams, mixer, settings, norm)
    (t, s, d), streams = streams.shape, dense(streams)
    x, post, across = (alloc.empty(shape, float32, streams.device) for shape in ((t, d), (t, s), (t, s, s)))
    sums = _sums(streams, mixer) if sums is None else sums
    normed, parts = norm is not None, sums.shape[2]
    width = padded(d) if normed else min(padded(d), WEIGHED)  # a norm is of all that a token has
    _mix[(t, triton.cdiv(d, width) + 1)](
        sums, streams, dense(mixer.base), dense(mixer.scale), x if norm is None else dense(norm), x, post, across, s, d, parts,
        mixer.fn.shape[0], *settings, HEAD=False, NORMED=normed, S=padded(s), PARTS=min(PARTS, padded(parts)), WIDTH=width,
        num_warps=warps(width))
    return x, post, across


def merge_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, sums: Tensor | None = None) -> Tensor:
    if not _fit(streams, *mixer) or not streams.numel():
        return ref.merge_streams(streams, mixer, settings)
    (t, s, d), streams = streams.shape, dense(streams)
    merged = alloc.empty((t, d), float32, streams.device)
    sums = _sums(streams, mixer) if sums is None else sums
    width, parts = min(padded(d), WEIGHED), sums.shape[2]
    _mix[(t, triton.cdiv(d, width))](
        sums, streams, dense(mixer.base), dense(mixer.scale), merged, merged, merged, merged, s, d, parts, mixer.fn.shape[0],
        *settings, HEAD=True, NORMED=False, S=padded(s), PARTS=min(PARTS, padded(parts)), WIDTH=width, num_warps=warps(width))
    return merged


def spread_streams(out: Tensor, streams: Tensor, post: Tensor, across: Tensor) -> Tensor:
    if not _fit(out, streams, post, across) or not streams.numel():
        return ref.spread_streams(out, streams, post, across)
    t, s, d = streams.shape
    spread = alloc.empty((t, s, d), float32, streams.device)
    width = min(padded(d), SPREAD)
    _spread[(t, triton.cdiv(d, width))](dense(out), dense(streams), dense(post), dense(across), spread, s, d,
                                        S=padded(s), WIDTH=width, num_warps=warps(padded(s) * width))
    return spread


def _fit(*given: Tensor | None) -> bool:
    return all(each is None or each.dtype == float32 for each in given)


def _sums(streams: Tensor, mixer: Mixer) -> Tensor:
    """float32 [t, m + 1, parts]: parts of fn times the streams, and of the streams' squares."""
    t, width, m = len(streams), streams.shape[1] * streams.shape[2], mixer.fn.shape[0]
    tokens, step = (1, STEP) if t <= FEW else (16, STEP // 2)  # or sixteen tokens' registers spill on some cards
    steps = triton.cdiv(width, step)
    each = triton.cdiv(steps, PARTS if tokens == 1 else 4)
    parts = triton.cdiv(steps, each)
    sums = alloc.empty((t, m + 1, parts), float32, streams.device)
    _multiply[(triton.cdiv(t, tokens), parts)](streams, dense(mixer.fn), sums, t, width, m, each, TOKENS=tokens,
                                               ROWS=padded(m, 16), STEP=step)
    return sums


@triton.jit
def _multiply(streams: Pointer, fn: Pointer, sums: Pointer, t: int, width: int, m: int, steps: int, TOKENS: tl.constexpr,
              ROWS: tl.constexpr, STEP: tl.constexpr) -> None:
    """A program owns some tokens and `steps` times STEP values of theirs. fn [m, width], sums [t, m + 1, parts]."""
    first, part, parts = tl.program_id(0) * TOKENS, tl.program_id(1), tl.num_programs(1)
    row, token = tl.arange(0, ROWS), first + tl.arange(0, TOKENS)
    squares = tl.zeros((TOKENS, STEP), tl.float32)
    products = tl.zeros((TOKENS, ROWS), tl.float32)
    partial = tl.zeros((ROWS, STEP), tl.float32)
    for step in range(steps):
        place = (part * steps + step) * STEP + tl.arange(0, STEP)
        x = tl.load(streams + token[:, None].to(tl.int64) * width + place[None, :],
                    (token < t)[:, None] & (place < width)[None, :], 0.0)
        weights = tl.load(fn + row[:, None] * width + place[None, :], (row < m)[:, None] & (place < width)[None, :], 0.0)
        squares += x * x
        if TOKENS == 1:
            partial += weights * x
        else:
            products = tl.dot(x, tl.trans(weights), products, input_precision="ieee")
    if TOKENS == 1:
        products = tl.sum(partial, 1)[None, :]
    to = sums + token[:, None] * (m + 1) * parts + part
    tl.store(to + row[None, :] * parts, products, (token < t)[:, None] & (row < m)[None, :])
    tl.store(to + m * parts, tl.sum(squares, 1)[:, None], (token < t)[:, None])


@triton.jit
def _summed(sums: Pointer, token: int, parts: int, m: int, rows: Block, inside: Block, PARTS: tl.constexpr) -> Block:
    """The mixture's `rows` [n] of a token: parts added up, PARTS side by side."""
    at = sums + (token * (m + 1) + rows[:, None]) * parts
    total = tl.zeros((rows.shape[0], PARTS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)[None, :]
        total += tl.load(at + part, (part < parts) & inside[:, None], 0.0)
    return tl.sum(total, 1)


@triton.jit
def _sinkhorn(logits: Block, inside: Block, eps: float, rounds: int) -> Block:
    """As `ref.sinkhorn`, of one matrix [S, S]: row and column divisors instead of the matrix itself."""
    no_row = tl.max(inside.to(tl.int32), 1)[:, None] == 0  # of the padding, whose divisors must not become 0
    no_column = tl.max(inside.to(tl.int32), 0)[None, :] == 0
    start = tl.exp(logits - tl.max(tl.where(inside, logits, -1e38), 1)[:, None])
    start = tl.where(inside, start, 0.0)
    start = tl.where(inside, start / (tl.sum(start, 1)[:, None] + no_row) + eps, 0.0)
    rows = tl.full((start.shape[0], 1), 1.0, tl.float32)
    columns = eps + tl.sum(start, 0)[None, :] + no_column
    for _ in range(rounds - 1):
        rows = eps * rows + tl.sum(start / columns, 1)[:, None] + no_row
        columns = eps * columns + tl.sum(start / rows, 0)[None, :] + no_column
    return start / rows / columns


@triton.jit
def _mix(sums: Pointer, streams: Pointer, base: Pointer, scale: Pointer, weight: Pointer, x: Pointer, post: Pointer,
         across: Pointer, s: int, d: int, parts: int, m: int, norm_eps: float, eps: float, rounds: int, HEAD: tl.constexpr,
         NORMED: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """A program owns WIDTH values of a token's x, with NORMED all of them; the last of a token, but for the head's, `post` and
    `across` instead."""
    token = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    squares = tl.sum(_summed(sums, token, parts, m, m + one, one == 0, PARTS), 0)
    norm = tl.rsqrt(squares / (s * d) + norm_eps)
    if HEAD or tl.program_id(1) < tl.num_programs(1) - 1:
        place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros((WIDTH,), tl.float32)
        for stream in range(s):
            mix = tl.sum(_summed(sums, token, parts, m, stream + one, one == 0, PARTS), 0) * norm
            share = tl.sigmoid(tl.load(base + stream) + tl.load(scale) * mix) + eps
            total += share * tl.load(streams + (token * s + stream) * d + place, place < d, 0.0)
        if NORMED:
            total *= tl.rsqrt(tl.sum(total * total, 0) / d + norm_eps) * tl.load(weight + place, place < d, 0.0)
        tl.store(x + token * d + place, total, place < d)
    else:
        to = tl.arange(0, S)
        sent = tl.load(scale + 1) * _summed(sums, token, parts, m, s + to, to < s, PARTS) * norm
        sent = 2 * tl.sigmoid(tl.load(base + s + to, to < s, 0.0) + sent)
        tl.store(post + token * s + to, sent, to < s)

        cell = tl.arange(0, S * S)
        inside = (cell // S < s) & (cell % S < s)
        cell = 2 * s + cell // S * s + cell % S
        logits = tl.load(scale + 2) * _summed(sums, token, parts, m, cell, inside, PARTS) * norm
        logits = tl.reshape(tl.load(base + cell, inside, 0.0) + logits, (S, S))
        inside_both = (to < s)[:, None] & (to < s)[None, :]
        balanced = _sinkhorn(logits, inside_both, eps, rounds)
        tl.store(across + (token * s + to)[:, None] * s + to[None, :], balanced, inside_both)


@triton.jit
def _spread(out: Pointer, streams: Pointer, post: Pointer, across: Pointer, spread: Pointer, s: int, d: int, S: tl.constexpr,
            WIDTH: tl.constexpr) -> None:
    """A program owns WIDTH values of every stream of a token."""
    token = tl.program_id(0).to(tl.int64)
    target, place = tl.arange(0, S), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (target < s)[:, None] & (place < d)[None, :]
    share = tl.load(post + token * s + target, target < s, 0.0)
    total = share[:, None] * tl.load(out + token * d + place, place < d, 0.0)[None, :]
    for source in range(s):
        share = tl.load(across + (token * s + source) * s + target, target < s, 0.0)
        total += share[:, None] * tl.load(streams + (token * s + source) * d + place, place < d, 0.0)[None, :]
    tl.store(spread + (token * s + target)[:, None] * d + place[None, :], total, inside)


AHEAD = (
    Case(_multiply, "*fp32 *fp32 *fp32 i32 i32:16 i32 i32", {"TOKENS": 1, "ROWS": 32, "STEP": 128}),
    Case(_multiply, "*fp32 *fp32 *fp32 i32 i32:16 i32 i32", {"TOKENS": 16, "ROWS": 32, "STEP": 64}),
    Case(_mix, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32:16 i32 i32 fp32 fp32 i32",
         {"HEAD": False, "NORMED": True, "S": 4, "PARTS": 128, "WIDTH": 4096}, warps=8),
    Case(_mix, "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32:16 i32 i32 fp32 fp32 i32",
         {"HEAD": True, "NORMED": False, "S": 4, "PARTS": 128, "WIDTH": 1024}, warps=2),
    Case(_spread, "*fp32 *fp32 *fp32 *fp32 *fp32 i32 i32:16", {"S": 4, "WIDTH": 512}),
)
