"""Attention in Triton, with keys read where they lie.

A program owns sixteen heads of a token, who share their keys, and in decoding only a part of these: a second launch then joins
the parts. Keys are gathered a tile at a time, first those of the window and then the entries, under a running softmax that
begins with the sink. Queries that are not float32, and keys that are neither float32, bfloat16 nor packed, go the way of `ref`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, complex64, float32, int64, uint8

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.attention import Entries, ref
from dsv4_kernels.cache.gpu import form, kept_keys
from dsv4_kernels.gpu import CACHED, DOT, Block, Pointer, dense, multiplied, padded, warps
from dsv4_kernels.norm_rope.gpu import real, rotate, turned_with
from dsv4_kernels.tuned import Sizes, default, options, tuned

HEADS = 16  # of a program: what a tensor core takes
SLICE_OF_D = tl.constexpr(64)  # of a query and its keys, that a warp multiplies alone
WIDE_KEYS = 16  # of a tile, where they are float32
AMD = torch.version.hip is not None


class Plan(NamedTuple):
    """Tiles' sizes: keys, and into how many parts a token's keys are cut."""

    keys: int
    splits: int


def sparse_attention(q: Tensor, recent: Tensor, entries: Entries | None, sink: Tensor, window: int,
                     turns: Tensor | None = None, at: Tensor | None = None, eps: float | None = None) -> Tensor:
    if entries is not None and not len(entries.kv):
        entries = None
    readable = recent.dtype in (*CACHED, uint8) and _fit(entries, recent)
    if not q.dtype == sink.dtype == float32 or not readable or not q.numel() or (
            turns is not None and (turns.dtype != complex64 or q.shape[-1] % 2)):
        return ref.sparse_attention(q, recent, entries, sink, window, turns, at, eps)
    (t, heads, d), q, recent, sink = q.shape, dense(q), dense(recent), dense(sink)
    kv, visible, chosen, n, k = recent, q, q, 0, 0  # whatever is not there is not read
    if entries is not None:
        kv, visible, n = dense(entries.kv), dense(entries.visible), len(entries.kv)
        if entries.chosen is not None:
            chosen, k = dense(entries.chosen), entries.chosen.shape[1]
    sizes = tuned("attention.attend", q.device)
    out, plan = alloc.empty_like(q), _plan(t, heads, min(window, len(recent)), k or n, recent.dtype == float32, sizes)
    parts, stats, angles, still = out, out, q, d
    if turns is not None:
        angles, still = real(turns), d - 2 * turns.shape[1]
    if plan.splits > 1:
        parts = alloc.empty((t, plan.splits, heads, d), float32, q.device)
        stats = alloc.empty((t, plan.splits, heads, 2), float32, q.device)
    _attend[(t, triton.cdiv(heads, HEADS), plan.splits)](
        q, recent, kv, visible, chosen, sink, q if at is None else at, angles, parts, stats, len(recent) - t, heads, d, still, n,
        k, window, d**-0.5, eps or 0.0, CHOOSING=k > 0, SPLIT=plan.splits > 1, LIVE=at is not None, NORMED=eps is not None,
        HEADS=HEADS, KEYS=plan.keys, D=padded(d, 16), FORM=form(recent), DOT=DOT,
        SLICED=recent.dtype != float32 or AMD,
        **options({**sizes, "warps": min(4, sizes["warps"])} if d <= 128 else sizes))
    if plan.splits > 1:
        _join[(t, heads)](parts, stats, angles, out, plan.splits, heads, d, still, TURNED=turns is not None,
                          SPLITS=padded(plan.splits), D=padded(d), num_warps=warps(padded(plan.splits) * d))
    return rotate(out, turns, True) if turns is not None and plan.splits == 1 else out


def _fit(entries: Entries | None, recent: Tensor) -> bool:
    if entries is None:
        return True
    whole = entries.visible.dtype == int64 and (entries.chosen is None or entries.chosen.dtype == int64)
    return entries.kv.dtype == recent.dtype and whole


def _plan(t: int, heads: int, near: int, far: int, wide: bool, sizes: Sizes) -> Plan:
    """Programs keep a card busy; with fewer tokens than that, keys are dealt out too."""
    keys = WIDE_KEYS if wide else sizes["keys"]
    tiles = triton.cdiv(near, keys) + triton.cdiv(far, keys)
    return Plan(keys, max(1, min(tiles, sizes["programs"] // (t * triton.cdiv(heads, HEADS)))))


@triton.jit
def _absorb(q: Block, keys: Block, seen: Block, most: Block, total: Block, out: Block, WIDE: tl.constexpr,
            DOT: tl.constexpr) -> tuple[Block, Block, Block]:
    """A tile of keys [n, d] joins the softmax of q [slices, heads, d / slices] or [heads, d]: greatest score, sum of powers,
    their weighted keys.

    Slices are multiplied side by side, each by a warp of its own, and then added: one product of heads by keys is too small to be
    dealt out, so that every warp would hold all of q and of the keys. (Float32 keys on NVIDIA's cards would take too much shared
    memory for it.)
    """
    KEYS: tl.constexpr = keys.shape[0]
    if len(q.shape) == 2:
        scores = multiplied(q, tl.trans(keys), tl.zeros((q.shape[0], KEYS), tl.float32), WIDE, DOT)
    else:
        sliced = tl.permute(tl.reshape(keys, (KEYS, q.shape[0], q.shape[2])), (1, 2, 0))
        scores = tl.sum(multiplied(q, sliced, tl.zeros((q.shape[0], q.shape[1], KEYS), tl.float32), WIDE, DOT), 0)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    more = tl.maximum(most, tl.max(scores, 1))
    shares, kept = tl.exp(scores - more[:, None]), tl.exp(most - more)
    return more, total * kept + tl.sum(shares, 1), multiplied(shares, keys, out * kept[:, None], WIDE, DOT)


@triton.jit(do_not_specialize=["before", "n", "k", "window"])
def _attend(q: Pointer, recent: Pointer, kv: Pointer, visible: Pointer, chosen: Pointer, sink: Pointer, at: Pointer,
            angles: Pointer, parts: Pointer, stats: Pointer, before: int, heads: int, d: int, still: int, n: int, k: int,
            window: int, scale: float, eps: float, CHOOSING: tl.constexpr, SPLIT: tl.constexpr, LIVE: tl.constexpr,
            NORMED: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr,
            SLICED: tl.constexpr, DOT: tl.constexpr) -> None:
    """parts [t, splits, heads, d] and stats [t, splits, heads, 2]; unless SPLIT, parts is the output itself.
    LIVE: the only token's position is read from `at`, and `recent` is a ring of `window` rows. NORMED: queries
    are as they were projected."""
    if LIVE:
        before = tl.minimum(tl.load(at), window - 1).to(tl.int32)
    token, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    head, channel, lane = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, D), tl.arange(0, KEYS)
    inside = (head < heads)[:, None] & (channel < d)[None, :]
    row = token.to(tl.int64) * heads + head
    query = tl.load(q + row[:, None] * d + channel[None, :], inside, 0.0)
    if NORMED:
        factor = tl.rsqrt(tl.sum(query * query, 1)[:, None] / d + eps)
        other = tl.load(q + row[:, None] * d + (channel ^ 1)[None, :], inside & (channel >= still)[None, :], 0.0)
        query = turned_with(query * factor, other * factor, angles + token.to(tl.int64) * (d - still), channel, d, still, False)
    query *= scale

    first = tl.maximum(before + token - window + 1, 0)
    near, far, sees = before + token + 1 - first, 0, 0
    if n > 0:
        sees = tl.minimum(tl.load(visible + token), n).to(tl.int32)
        far = k if CHOOSING else tl.maximum(sees, 0)
    near_tiles = tl.cdiv(near, KEYS)
    tiles = near_tiles + tl.cdiv(far, KEYS)
    begin = split * tl.cdiv(tiles, splits)
    end = tl.minimum(begin + tl.cdiv(tiles, splits), tiles)

    sinks = tl.load(sink + head, head < heads, 0.0)
    most = tl.maximum(sinks, -1e30)  # never infinite, so that differences are numbers
    total = tl.where(split == 0, tl.exp(sinks - most), 0.0)
    SLICE: tl.constexpr = min(D, SLICE_OF_D)
    if SLICED:
        query = tl.permute(tl.reshape(query, (HEADS, D // SLICE, SLICE)), (1, 0, 2))
    out = tl.zeros((HEADS, D), tl.float32)
    for tile in range(begin, tl.minimum(end, near_tiles)):
        slot = tile * KEYS + lane
        keys = kept_keys(recent, (first + slot).to(tl.int64), slot < near, channel, d, still, FORM)
        most, total, out = _absorb(query, keys, slot < near, most, total, out, FORM == 0, DOT)
    for tile in range(tl.maximum(begin, near_tiles), end):
        slot = (tile - near_tiles) * KEYS + lane
        key = slot.to(tl.int64)
        if CHOOSING:
            key = tl.load(chosen + token.to(tl.int64) * k + slot, slot < k, -1)
        seen = (slot < far) & (key >= 0) & (key < sees)
        keys = kept_keys(kv, key, seen, channel, d, still, FORM)
        most, total, out = _absorb(query, keys, seen, most, total, out, FORM == 0, DOT)

    if SPLIT:
        row = (token.to(tl.int64) * splits + split) * heads + head
        tl.store(stats + row * 2, most, head < heads)
        tl.store(stats + row * 2 + 1, total, head < heads)
    else:
        out = out / total[:, None]
    tl.store(parts + row[:, None] * d + channel[None, :], out, inside)


@triton.jit(do_not_specialize=["splits"])
def _join(parts: Pointer, stats: Pointer, angles: Pointer, out: Pointer, splits: int, heads: int, d: int, still: int,
          TURNED: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr) -> None:
    """A program owns a head of a token: its parts, each weighed by how great its scores were. TURNED: back from its place."""
    token, head, channel, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D), tl.arange(0, SPLITS)
    row = (token * splits + split) * heads + head
    most = tl.load(stats + row * 2, split < splits, -1e30)
    share = tl.exp(most - tl.max(most, 0))
    total = tl.sum(tl.load(stats + row * 2 + 1, split < splits, 0.0) * share, 0)
    inside = (split < splits)[:, None] & (channel < d)[None, :]
    values = tl.load(parts + row[:, None] * d + channel[None, :], inside, 0.0)
    value = tl.sum(values * share[:, None], 0) / total
    if TURNED:
        inside &= (channel >= still)[None, :]
        others = tl.load(parts + row[:, None] * d + (channel ^ 1)[None, :], inside, 0.0)
        other = tl.sum(others * share[:, None], 0) / total
        value = turned_with(value, other, angles + token * (d - still), channel, d, still, True)
    tl.store(out + (token * heads + head) * d + channel, value, channel < d)


AHEAD = (
    Case(_attend, "*fp32 *u8 *u8 *i64 *i64 *fp32 *i64 *fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16 i32 i32 i32 fp32 fp32",
         {"CHOOSING": True, "SPLIT": True, "LIVE": True, "NORMED": True, "HEADS": HEADS,
          "KEYS": default("attention.attend")["keys"], "D": 512, "FORM": 2, "SLICED": True, "DOT": DOT},
         sizes="attention.attend"),
    Case(_attend, "*fp32 *fp32 *fp32 *i64 *i64 *fp32 *i64 *fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16 i32 i32 i32 fp32 fp32",
         {"CHOOSING": False, "SPLIT": False, "LIVE": False, "NORMED": True, "HEADS": HEADS, "KEYS": WIDE_KEYS, "D": 512,
          "FORM": 0, "SLICED": False, "DOT": DOT}, sizes="attention.attend", on_amd={"SLICED": True}),
    Case(_join, "*fp32 *fp32 *fp32 *fp32 i32 i32:16 i32:16 i32:16", {"TURNED": True, "SPLITS": 32, "D": 512}, warps=8),
)
