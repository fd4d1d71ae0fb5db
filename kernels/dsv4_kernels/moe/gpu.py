"""Routed experts in Triton, on packed weights where they lie.

Up to FEW tokens, two launches: a program of the first owns some hidden values of one token and slot and walks through both their
rows, gate and up; one of the second owns some outputs of a token and walks through its experts, one after another, so that sums
have one order. More tokens: token-slot pairs are sorted by expert on the device (the host waits for nothing), a program owns a
tile of pairs of one expert, and each pair's result waits in memory of its own until a last kernel sums them. Experts of
several formats or shapes, formats without a kernel and activations that are not float32 go the way of `ref`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import DOT, Block, Pointer, dense, padded
from dsv4_kernels.linear.gpu import FEW, few_tile, many_tile
from dsv4_kernels.moe import Expert, Experts, ref
from dsv4_kernels.tuned import default, options, tuned
from dsv4_kernels.unpack import LAYOUTS, Matrix, matrix
from dsv4_kernels.unpack.gpu import columns, met, multiplied, unpacked

_SLOT = "_card_bank"  # where Experts keep their Bank


class Bank(NamedTuple):
    """Experts alike: the first one's matrices, and where the others' lie, counted from there."""

    gate: Matrix
    up: Matrix
    down: Matrix
    offsets: Tensor  # int64 [6, experts]: of gate, up, down in units of `unit` bytes, then of what lies apart, in elements
    unit: int

    @property
    def experts(self) -> int:
        return self.offsets.shape[1]


def routed_experts(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert], limit: float,
                   onto: Tensor | None = None) -> Tensor:
    bank = bank_of(experts) if x.dtype == weights.dtype == float32 and x.numel() and weights.numel() else None
    if bank is None or chosen.dtype != int64 or (onto is not None and (onto.dtype != float32 or not onto.is_contiguous())):
        return ref.routed_experts(x, weights, chosen, experts, limit, onto)
    return _experts(dense(x), dense(weights), dense(chosen), bank, limit, onto)


def shared_expert(x: Tensor, expert: Expert, limit: float) -> Tensor:
    """An expert that everybody chose, with weight 1."""
    parts = tuple(matrix(part) for part in expert)
    gate, up, down = parts
    if gate is None or up is None or down is None or not alike(gate, up) or x.dtype != float32 or not x.numel():
        return ref.shared_expert(x, expert, limit)
    ones, zeros, offsets = _everybody(x.shape[0], x.device)
    return _experts(dense(x), ones, zeros, Bank(gate, up, down, offsets, 16), limit, None)


def ask_for(experts: Sequence[Expert], numbers: Sequence[int]) -> None:
    """What lies in a card's memory need not be asked for."""


@lru_cache(maxsize=16)
def _everybody(tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return (torch.ones(tokens, 1, device=device), torch.zeros(tokens, 1, dtype=int64, device=device),
                torch.zeros(6, 1, dtype=int64, device=device))


def bank_of(experts: Sequence[Expert]) -> Bank | None:
    """None when they cannot be computed together. Kept for Experts."""
    if not isinstance(experts, Experts):
        return _gathered(experts)
    known = vars(experts)
    if _SLOT not in known:
        known[_SLOT] = _gathered(experts)
    found: Bank | None = known[_SLOT]
    return found


def _gathered(experts: Sequence[Expert]) -> Bank | None:
    kinds: list[list[Matrix]] = []
    for kind in zip(*experts, strict=True):
        found = [matrix(part) for part in kind]
        same = [part for part in found if part is not None and found[0] is not None and alike(part, found[0])]
        if len(same) != len(found):
            return None
        kinds.append(same)
    gate, up, down = (kind[0] for kind in kinds)
    if not alike(gate, up):
        return None
    bytes_away = [[part.data.data_ptr() - kind[0].data.data_ptr() for part in kind] for kind in kinds]
    apart = [[(part.apart.data_ptr() - kind[0].apart.data_ptr()) // part.apart.element_size() for part in kind]
             for kind in kinds]
    unit = gcd(16, *(away for kind in bytes_away for away in kind))
    offsets = [[away // unit for away in kind] for kind in bytes_away] + apart
    with torch.inference_mode(False):
        return Bank(gate, up, down, torch.tensor(offsets, dtype=int64).to(gate.data.device), unit)


def alike(a: Matrix, b: Matrix) -> bool:
    return (a[3:] == b[3:] and a.format == b.format and a.apart.dtype == b.apart.dtype
            and a.data.device == b.data.device)


def _experts(x: Tensor, shares: Tensor, chosen: Tensor, bank: Bank, limit: float, onto: Tensor | None) -> Tensor:
    out = alloc.empty_like(x) if onto is None else onto
    compute = _few if x.shape[0] <= FEW else _many
    compute(x, shares, chosen, bank, limit, out, onto is not None)
    return out


def _few(x: Tensor, shares: Tensor, chosen: Tensor, bank: Bank, limit: float, out: Tensor, add: bool) -> None:
    (tokens, slots), gate, down = chosen.shape, bank.gate, bank.down
    hidden = alloc.empty((tokens * slots, gate.rows), float32, x.device)
    sizes = tuned("moe.hidden_few", x.device, gate.format)
    rows, subs = few_tile(gate.layout, 1, gate.subs, gate.rows, sizes)
    _hidden_few[(triton.cdiv(gate.rows, rows), tokens * slots)](
        x, shares, chosen, bank.offsets, gate.data, gate.apart, bank.up.data, bank.up.apart, hidden, slots, bank.experts,
        *_sizes(gate), limit, FORMAT=gate.format, FIELDS=gate.layout.fields, LANES=gate.layout.lanes, UNIT=bank.unit,
        ROWS=rows, SUBS=subs, **options(sizes))
    sizes = tuned("moe.down_few", x.device, down.format)
    rows, subs = few_tile(down.layout, 1, down.subs, down.rows, sizes)
    _down_few[(triton.cdiv(down.rows, rows), tokens)](
        hidden, chosen, bank.offsets, down.data, down.apart, out, slots, bank.experts, *_sizes(down), FORMAT=down.format,
        FIELDS=down.layout.fields, LANES=down.layout.lanes, UNIT=bank.unit, ROWS=rows, SUBS=subs, ADD=add, **options(sizes))


def _many(x: Tensor, shares: Tensor, chosen: Tensor, bank: Bank, limit: float, out: Tensor, add: bool) -> None:
    (tokens, slots), gate, down, d = chosen.shape, bank.gate, bank.down, x.shape[1]
    pairs = tokens * slots
    towards, back = tuned("moe.hidden_many", x.device, gate.format), tuned("moe.down_many", x.device, down.format)
    most = min(many_tile(part.layout, 1 + pairs // bank.experts, part.exact, sizes)[0]
               for part, sizes in ((gate, towards), (down, back)))
    order, ends, owners, starts = sorted_by_expert(chosen, bank.experts, most)
    hidden = alloc.empty((pairs, gate.rows), float32, x.device)
    _, n, subs = many_tile(gate.layout, most, gate.exact, towards)
    _hidden_many[(len(owners), triton.cdiv(gate.rows, n // 2))](
        x, shares, order, ends, owners, starts, bank.offsets, gate.data, gate.apart, bank.up.data, bank.up.apart, hidden, slots,
        bank.experts, *_sizes(gate), limit, FORMAT=gate.format, FIELDS=gate.layout.fields, LANES=gate.layout.lanes,
        UNIT=bank.unit, M=most, N=n // 2, SUBS=subs, EXACT=gate.exact, DOT=DOT, **options(towards))
    parts = alloc.empty((pairs, d), float32, x.device)
    _, n, subs = many_tile(down.layout, most, down.exact, back)
    _down_many[(len(owners), triton.cdiv(d, n))](
        hidden, order, ends, owners, starts, bank.offsets, down.data, down.apart, parts, bank.experts, *_sizes(down),
        FORMAT=down.format, FIELDS=down.layout.fields, LANES=down.layout.lanes, UNIT=bank.unit, M=most, N=n, SUBS=subs,
        EXACT=down.exact, DOT=DOT, **options(back))
    _combine[(tokens, triton.cdiv(d, 1024))](parts, out, slots, d, ADD=add, COLS=min(1024, padded(d)))


def sorted_by_expert(chosen: Tensor, experts: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deals token-slot pairs, sorted by expert, to tiles of at most `most` pairs of one expert, without asking the device.

    chosen int64 [t, k] -> order [t * k] (place -> pair), ends [experts] (the place behind each expert's last pair), and of each
    tile that there might be: owners (its expert; `experts` for a tile that is none) and starts (its first place). All int64.
    """
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    edges = torch.searchsorted(flat[order], torch.arange(experts + 1, device=chosen.device))
    tiles = (edges[1:] - edges[:-1] + most - 1) // most
    behind = tiles.cumsum(0)
    place = torch.arange(min(len(flat), len(flat) // most + experts), device=chosen.device)
    owners = torch.searchsorted(behind, place, right=True)
    safe = owners.clamp(max=experts - 1)
    return order, edges[1:].contiguous(), owners, edges[safe] + (place - behind[safe] + tiles[safe]) * most


def _sizes(w: Matrix) -> tuple[int, int, int, int, int]:
    return w.rows, w.subs, w.cols, w.row_bytes, w.apart_cols


@triton.jit
def _swiglu(gate: Block, up: Block, limit: float) -> Block:
    """silu(min(gate, limit)) * clamp(up, -limit, limit); comparisons let NaN pass."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["slots", "experts"])
def _hidden_few(x: Pointer, shares: Pointer, chosen: Pointer, offsets: Pointer, gate: Pointer, gate_apart: Pointer, up: Pointer,
                up_apart: Pointer, hidden: Pointer, slots: int, experts: int, rows: int, subs: int, cols: int, row_bytes: int,
                apart_cols: int, limit: float, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
                UNIT: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr) -> None:
    pair = tl.program_id(1).to(tl.int64)
    offset = offsets + tl.load(chosen + pair)
    gate += tl.load(offset) * UNIT
    up += tl.load(offset + experts) * UNIT
    gate_apart += tl.load(offset + 3 * experts)
    up_apart += tl.load(offset + 4 * experts)
    own, one = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 1)
    values = hidden_rows(x + pair // slots * cols, gate, gate_apart, up, up_apart, own, one, 1, rows, subs, cols, row_bytes,
                         apart_cols, limit, FORMAT, FIELDS, LANES, 1, ROWS, SUBS)
    tl.store(hidden + pair * rows + own[None, :], values * tl.load(shares + pair), (own < rows)[None, :])


@triton.jit
def hidden_rows(x: Pointer, gate: Pointer, gate_apart: Pointer, up: Pointer, up_apart: Pointer, own: Block, token: Block,
                tokens: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, limit: float,
                FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
                SUBS: tl.constexpr) -> Block:
    """float32 [TOKENS, ROWS]: of an expert's hidden values those that the rows `own` of gate and up make, without a share."""
    row, lane = own.to(tl.int64)[:, None, None], tl.arange(0, LANES)[None, None, :]
    vectors = x + token.to(tl.int64)[:, None, None, None] * cols
    gates = tl.zeros((TOKENS, ROWS, SUBS, LANES), tl.float32)
    ups = tl.zeros((TOKENS, ROWS, SUBS, LANES), tl.float32)
    for first in range(0, subs, SUBS):
        sub = first + tl.arange(0, SUBS)[None, :, None]
        inside = (own < rows)[:, None, None] & (sub < subs)
        for FIELD in tl.static_range(FIELDS):
            column = columns(FORMAT, FIELD, sub, lane)[None]
            value = tl.load(vectors + column, (token < tokens)[:, None, None, None] & (column < cols), 0.0)
            weight = unpacked(FORMAT, FIELD, gate, gate_apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
            gates += value * weight[None]
            weight = unpacked(FORMAT, FIELD, up, up_apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
            ups += value * weight[None]
    return _swiglu(tl.sum(tl.sum(gates, 3), 2), tl.sum(tl.sum(ups, 3), 2), limit)


@triton.jit(do_not_specialize=["slots", "experts"])
def _down_few(hidden: Pointer, chosen: Pointer, offsets: Pointer, down: Pointer, down_apart: Pointer, out: Pointer, slots: int,
              experts: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, FORMAT: tl.constexpr,
              FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
              ADD: tl.constexpr) -> None:
    token = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = down_rows(hidden, chosen, offsets, down, down_apart, own, token, slots, experts, rows, subs, cols, row_bytes,
                     apart_cols, FORMAT, FIELDS, LANES, UNIT, ROWS, SUBS, False)
    to = out + token * rows + own
    if ADD:
        sums += tl.load(to, own < rows, 0.0)
    tl.store(to, sums, own < rows)


@triton.jit
def down_rows(hidden: Pointer, chosen: Pointer, offsets: Pointer, down: Pointer, down_apart: Pointer, own: Block, token: Block,
              slots: int, experts: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, FORMAT: tl.constexpr,
              FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
              HELD: tl.constexpr) -> Block:
    """float32 [ROWS]: what the rows `own` of a token's experts make of its hidden values, summed; if HELD, of those experts
    that a seventh row of the offsets says are held."""
    row, lane = own.to(tl.int64)[:, None, None], tl.arange(0, LANES)[None, None, :]
    total = tl.zeros((ROWS, SUBS, LANES), tl.float32)
    for pair in range(token * slots, (token + 1) * slots):
        offset = offsets + tl.load(chosen + pair)
        data, apart = down + tl.load(offset + 2 * experts) * UNIT, down_apart + tl.load(offset + 5 * experts)
        walked = subs
        if HELD:
            walked = tl.where(tl.load(offset + 6 * experts) != 0, subs, 0)
        for first in range(0, walked, SUBS):
            sub = first + tl.arange(0, SUBS)[None, :, None]
            inside = (own < rows)[:, None, None] & (sub < subs)
            for FIELD in tl.static_range(FIELDS):
                column = columns(FORMAT, FIELD, sub, lane)
                value = tl.load(hidden + pair * cols + column, column < cols, 0.0)
                total += value * unpacked(FORMAT, FIELD, data, apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
    return tl.sum(tl.sum(total, 2), 1)


@triton.jit(do_not_specialize=["slots", "experts"])
def _hidden_many(x: Pointer, shares: Pointer, order: Pointer, ends: Pointer, owners: Pointer, starts: Pointer, offsets: Pointer,
                 gate: Pointer, gate_apart: Pointer, up: Pointer, up_apart: Pointer, hidden: Pointer, slots: int, experts: int,
                 rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, limit: float, FORMAT: tl.constexpr,
                 FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                 SUBS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr) -> None:
    expert = tl.load(owners + tl.program_id(0))
    if expert < experts:
        offset = offsets + expert
        gate += tl.load(offset) * UNIT
        up += tl.load(offset + experts) * UNIT
        gate_apart += tl.load(offset + 3 * experts)
        up_apart += tl.load(offset + 4 * experts)
        place = (tl.load(starts + tl.program_id(0)) + tl.arange(0, M))[:, None]
        there = place < tl.load(ends + expert)
        pair = tl.load(order + place, there, 0)
        own = tl.program_id(1) * N + tl.arange(0, N)
        row, lane = own.to(tl.int64)[:, None, None], tl.arange(0, LANES)[None, None, :]
        gates, ups = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
        for first in range(0, subs, SUBS):
            sub = first + tl.arange(0, SUBS)[None, :, None]
            inside = (own < rows)[:, None, None] & (sub < subs)
            for FIELD in tl.static_range(FIELDS):
                values = met(FORMAT, FIELD, x + pair // slots * cols, there, first, cols, SUBS * LANES, LANES)
                tile = unpacked(FORMAT, FIELD, gate, gate_apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
                gates = multiplied(values, tile, gates, EXACT, DOT)
                tile = unpacked(FORMAT, FIELD, up, up_apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
                ups = multiplied(values, tile, ups, EXACT, DOT)
        result = _swiglu(gates, ups, limit) * tl.load(shares + pair, there, 0.0)
        tl.store(hidden + place * rows + own[None, :], result, there & (own < rows)[None, :])


@triton.jit(do_not_specialize=["experts"])
def _down_many(hidden: Pointer, order: Pointer, ends: Pointer, owners: Pointer, starts: Pointer, offsets: Pointer, down: Pointer,
               down_apart: Pointer, parts: Pointer, experts: int, rows: int, subs: int, cols: int, row_bytes: int,
               apart_cols: int, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr,
               M: tl.constexpr, N: tl.constexpr, SUBS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr) -> None:
    expert = tl.load(owners + tl.program_id(0))
    if expert < experts:
        data = down + tl.load(offsets + 2 * experts + expert) * UNIT
        apart = down_apart + tl.load(offsets + 5 * experts + expert)
        place = (tl.load(starts + tl.program_id(0)) + tl.arange(0, M))[:, None]
        there = place < tl.load(ends + expert)
        own = tl.program_id(1) * N + tl.arange(0, N)
        row, lane = own.to(tl.int64)[:, None, None], tl.arange(0, LANES)[None, None, :]
        total = tl.zeros((M, N), tl.float32)
        for first in range(0, subs, SUBS):
            sub = first + tl.arange(0, SUBS)[None, :, None]
            inside = (own < rows)[:, None, None] & (sub < subs)
            for FIELD in tl.static_range(FIELDS):
                tile = unpacked(FORMAT, FIELD, data, apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
                values = met(FORMAT, FIELD, hidden + place * cols, there, first, cols, SUBS * LANES, LANES)
                total = multiplied(values, tile, total, EXACT, DOT)
        pair = tl.load(order + place, there, 0)
        tl.store(parts + pair * rows + own[None, :], total, there & (own < rows)[None, :])


@triton.jit(do_not_specialize=["slots"])
def _combine(parts: Pointer, out: Pointer, slots: int, d: int, ADD: tl.constexpr, COLS: tl.constexpr) -> None:
    """Sums what a token's experts said, in the order of its slots."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    to = out + token * d + column
    total = tl.zeros((COLS,), tl.float32)
    if ADD:
        total += tl.load(to, column < d, 0.0)
    for slot in range(slots):
        total += tl.load(parts + (token * slots + slot) * d + column, column < d, 0.0)
    tl.store(to, total, column < d)


def _cases() -> tuple[Case, ...]:
    """The formats of routed experts at the sizes of Flash."""
    found = [Case(_combine, "*fp32 *fp32 i32 i32:16", {"ADD": True, "COLS": 1024})]
    sizes = "i32 i32 i32:16 i32:16 i32:16 i32:16 i32"
    for name in ("mxfp4", "fp4", "q4_k", "q2_k", "iq2_xxs"):
        layout, apart = LAYOUTS[name], {"iq2_xxs": "*i32"}.get(name, "*u8")
        about = {"FORMAT": name, "FIELDS": layout.fields, "LANES": layout.lanes, "UNIT": 16}
        rows, subs = few_tile(layout, 1, 64, 2048, default("moe.hidden_few"))
        pair = f"*u8 {apart} *u8 {apart}"
        found.append(Case(_hidden_few, f"*fp32 *fp32 *i64 *i64 {pair} *fp32 {sizes} fp32", {**about, "ROWS": rows, "SUBS": subs}))
        found.append(Case(_down_few, f"*fp32 *i64 *i64 *u8 {apart} *fp32 {sizes}",
                          {**about, "ROWS": rows, "SUBS": subs, "ADD": True}))
        m, n, subs = many_tile(layout, 512, False, default("moe.hidden_many"))
        dots = {"SUBS": subs, "EXACT": False, "DOT": DOT}
        found.append(Case(_hidden_many, f"*fp32 *fp32 *i64 *i64 *i64 *i64 *i64 {pair} *fp32 {sizes} fp32",
                          {**about, "M": m, "N": n // 2, **dots}))
        found.append(Case(_down_many, f"*fp32 *i64 *i64 *i64 *i64 *i64 *u8 {apart} *fp32 {sizes.removeprefix('i32 ')}",
                          {**about, "M": m, "N": n, **dots}))
    return tuple(found)


AHEAD = _cases()
