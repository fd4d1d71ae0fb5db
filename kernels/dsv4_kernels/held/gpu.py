"""Experts of which some are held, in Triton: five launches from the router to the streams, whatever is held.

Up to FEW tokens, and where `moe` could compute shared and routed experts in Triton; everything else goes the way of `ref`. A
program finds out itself whether its expert is held and where, in a table that stays where it is. `Told`, and the part that
joins, may be pinned memory of the host: what passes are some 16 KB each way, too little for a copy of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Pointer, Together, dense, padded, warps
from dsv4_kernels.held import Held, Told, ref
from dsv4_kernels.linear.gpu import FEW, few_sums, few_tile, linear
from dsv4_kernels.moe import Expert
from dsv4_kernels.moe import gpu as moe
from dsv4_kernels.moe.gpu import Bank, alike, down_rows, hidden_rows
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.residual.gpu import join, joined
from dsv4_kernels.router import Router
from dsv4_kernels.router.gpu import best, listed
from dsv4_kernels.tuned import Sizes, default, options, tuned
from dsv4_kernels.unpack import LAYOUTS, Matrix, matrix

_SLOT = "_card_bank"  # where a Held keeps its Bank, whose offsets have a seventh row: 1 for what is held, else 0
UNIT = 16  # bytes that places of held experts are multiples of, so that a change of them changes no kernel
COLS = 32  # of all streams that a program of `_join` owns


def route_and_tell(x: Tensor, router: Router, ids: Tensor, told: Told) -> tuple[Tensor, Tensor]:
    by = router.bias if router.table is None else router.table
    assert by is not None, "a layer is routed by a table or by a bias"
    hashed = router.table is not None
    if x.dtype != float32 or by.dtype != (int64 if hashed else float32) or ids.dtype != int64 or not len(x):
        return ref.route_and_tell(x, router, ids, told)
    (t, d), n, k = x.shape, router.gate.shape[0], told.experts.shape[1]
    logits = dense(linear(x, router.gate))
    weights, experts = alloc.empty((t, k), float32, x.device), alloc.empty((t, k), int64, x.device)
    _choose_and_tell[(t,)](logits, dense(by), dense(ids), dense(x), weights, experts, *told, n, len(by), k, d, router.scale,
                           HASHED=hashed, N=padded(n), K=padded(k), WIDTH=min(1024, padded(d)), num_warps=warps(n))
    return weights, experts


def held_experts(x: Tensor, weights: Tensor, chosen: Tensor, shared: Expert, held: Held, limit: float) -> Tensor:
    bank, (gate, up, down) = _bank_of(held), map(matrix, shared)
    if (bank is None or gate is None or up is None or down is None or not alike(gate, up) or not 0 < len(x) <= FEW
            or not x.dtype == weights.dtype == float32 or chosen.dtype != int64):
        return ref.held_experts(x, weights, chosen, shared, held, limit)
    x, chosen = dense(x), dense(chosen)
    hidden, common = _hidden(x, dense(weights), chosen, bank, gate, up, limit)
    out, (tokens, slots), last = alloc.empty_like(x), chosen.shape, bank.down
    sizes = tuned("moe.down_few", x.device, last.format)
    rows, subs = few_tile(last.layout, 1, last.subs, last.rows, sizes)
    kind = (down.format, *down.layout, few_tile(down.layout, 1, down.subs, down.rows, sizes)[1])
    _down_held[(triton.cdiv(last.rows, rows), tokens)](
        hidden, chosen, bank.offsets, last.data, last.apart, common,
        (down.data, down.apart, down.subs, down.cols, down.row_bytes, down.apart_cols), out, slots, bank.experts, last.rows,
        last.subs, last.cols, last.row_bytes, last.apart_cols, FORMAT=last.format, FIELDS=last.layout.fields,
        LANES=last.layout.lanes, UNIT=bank.unit, ROWS=rows, SUBS=subs, KIND=kind, **options(sizes))
    return out


def _hidden(x: Tensor, weights: Tensor, chosen: Tensor, bank: Bank, gate: Matrix, up: Matrix,
            limit: float) -> tuple[Tensor, Tensor]:
    """Hidden values [t * k, width] of what is held, with their shares (the others' are not written), and [t, width] of the
    shared expert, whose matrices `gate` and `up` are."""
    (tokens, slots), first = chosen.shape, bank.gate
    hidden, common = (alloc.empty((count, w.rows), float32, x.device) for count, w in ((tokens * slots, first), (tokens, gate)))
    sizes = tuned("moe.hidden_few", x.device, first.format)
    kind = _kind(gate, sizes)
    (rows, subs), own = few_tile(first.layout, 1, first.subs, first.rows, sizes), kind[3]
    _hidden_held[(max(triton.cdiv(first.rows, rows), triton.cdiv(gate.rows, own)), tokens * (slots + 1))](
        x, weights, chosen, bank.offsets, first.data, first.apart, bank.up.data, bank.up.apart, hidden,
        (gate.data, gate.apart, up.data, up.apart, common, gate.rows, gate.subs, gate.row_bytes, gate.apart_cols), slots,
        bank.experts, first.rows, first.subs, first.cols, first.row_bytes, first.apart_cols, limit, FORMAT=first.format,
        FIELDS=first.layout.fields, LANES=first.layout.lanes, UNIT=bank.unit, ROWS=rows, SUBS=subs, KIND=kind, **options(sizes))
    return hidden, common


def _kind(w: Matrix, sizes: Sizes) -> tuple[str, int, int, int, int]:
    """Format, fields, lanes, rows and subs of a program."""
    return (w.format, *w.layout, *few_tile(w.layout, 1, w.subs, w.rows, sizes))


def other_experts(told: Told, experts: Sequence[Expert], held: Held, limit: float, part: Tensor) -> None:
    """Only where the CPU's memory is a card's, in the interpreter."""
    ref.add_others(moe, told, experts, held, limit, part)


def renew(held: Held) -> bool:
    """Writes anew where everything is, into the table that recorded runs read, behind whatever reads it now."""
    known: dict[str, Bank | None] = vars(held)
    bank = known.get(_SLOT)
    if bank is None:  # never computed, or not by these kernels
        known.pop(_SLOT, None)
        return True
    offsets = _offsets(held, bank)
    if offsets is None:
        known[_SLOT] = None
        return False
    bank.offsets.copy_(offsets)
    return True


def _bank_of(held: Held) -> Bank | None:
    """None where something is held that the kernels do not compute. Kept."""
    known = vars(held)
    if _SLOT not in known:
        known[_SLOT] = _gathered(held)
    found: Bank | None = known[_SLOT]
    return found


def _gathered(held: Held) -> Bank | None:
    assert held.like is not None, "who holds nothing has no bank"
    gate, up, down = map(matrix, held.like)
    if gate is None or up is None or down is None or not alike(gate, up):
        return None
    with torch.inference_mode(False):
        bank = Bank(gate, up, down, torch.zeros((7, len(held.places)), dtype=int64, device=gate.data.device), UNIT)
        offsets = _offsets(held, bank)
        if offsets is None:
            return None
        bank.offsets.copy_(offsets)
    return bank


def _offsets(held: Held, bank: Bank) -> Tensor | None:
    """int64 [7, experts], on the host; None where the kernels cannot compute what is held."""
    found = torch.zeros(bank.offsets.shape, dtype=int64)
    for number, place in enumerate(held.places.tolist()):
        for kind, (first, part) in enumerate(zip(bank[:3], held.there[place], strict=True) if place >= 0 else ()):
            own = matrix(part)
            if own is None or not alike(own, first) or (own.data.data_ptr() - first.data.data_ptr()) % UNIT:
                return None
            found[kind, number] = (own.data.data_ptr() - first.data.data_ptr()) // UNIT
            found[3 + kind, number] = (own.apart.data_ptr() - first.apart.data_ptr()) // own.apart.element_size()
        found[6, number] = place >= 0
    return found


def join_part(out: Tensor, part: Tensor, residual: Residual) -> Joined:
    if not len(out) or not all(each.dtype == float32 for each in (out, part, *residual)):
        return ref.join_part(out, part, residual)
    tokens, d = out.shape
    programs = triton.cdiv(d, COLS)
    made, given, constants = joined(residual, programs)
    _join[(programs, tokens)](dense(out), dense(part), given, d, COLS=COLS, **constants)
    return made


@triton.jit
def _choose_and_tell(logits: Pointer, by: Pointer, ids: Pointer, x: Pointer, weights: Pointer, experts: Pointer, told_x: Pointer,
                     told_weights: Pointer, told_experts: Pointer, n: int, vocabulary: int, k: int, d: int, scale: float,
                     HASHED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """A program owns a token. by: the router's table if HASHED, else its bias."""
    token, slot = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    for first in range(0, d, WIDTH):
        column = first + tl.arange(0, WIDTH)
        tl.store(told_x + token * d + column, tl.load(x + token * d + column, column < d, 0.0), column < d)
    if HASHED:
        chosen, share = listed(logits + token * n, by, ids + token, n, vocabulary, k, scale, K)
    else:
        chosen, share = best(logits + token * n, by, n, k, scale, N, K)
    place = token * k + slot
    tl.store(weights + place, share, slot < k)
    tl.store(experts + place, chosen, slot < k)
    tl.store(told_weights + place, share, slot < k)
    tl.store(told_experts + place, chosen, slot < k)


@triton.jit(do_not_specialize=["slots", "experts"])
def _hidden_held(x: Pointer, shares: Pointer, chosen: Pointer, offsets: Pointer, gate: Pointer, gate_apart: Pointer, up: Pointer,
                 up_apart: Pointer, hidden: Pointer, shared: Together, slots: int, experts: int, rows: int, subs: int, cols: int,
                 row_bytes: int, apart_cols: int, limit: float, FORMAT: tl.constexpr, FIELDS: tl.constexpr,
                 LANES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr, KIND: tl.constexpr) -> None:
    """A program owns some hidden values of a token's expert, if that is held; of one slot more than it chose, the shared
    expert's, with a KIND of its own: format, fields, lanes, rows and subs."""
    token, slot, one = (tl.program_id(1) // (slots + 1)).to(tl.int64), tl.program_id(1) % (slots + 1), tl.arange(0, 1)
    x += token * cols
    if slot < slots:
        pair = token * slots + slot
        offset, own = offsets + tl.load(chosen + pair), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        if (tl.load(offset + 6 * experts) != 0) & (tl.program_id(0) * ROWS < rows):
            values = hidden_rows(x, gate + tl.load(offset) * UNIT, gate_apart + tl.load(offset + 3 * experts),
                                 up + tl.load(offset + experts) * UNIT, up_apart + tl.load(offset + 4 * experts), own, one, 1,
                                 rows, subs, cols, row_bytes, apart_cols, limit, FORMAT, FIELDS, LANES, 1, ROWS, SUBS)
            tl.store(hidden + pair * rows + own[None, :], values * tl.load(shares + pair), (own < rows)[None, :])
    else:
        data, data_apart, other, other_apart, to, width, own_subs, own_bytes, own_apart = shared
        mine = tl.program_id(0) * KIND[3] + tl.arange(0, KIND[3])
        if tl.program_id(0) * KIND[3] < width:
            values = hidden_rows(x, data, data_apart, other, other_apart, mine, one, 1, width, own_subs, cols, own_bytes,
                                 own_apart, limit, KIND[0], KIND[1], KIND[2], 1, KIND[3], KIND[4])
            tl.store(to + token * width + mine[None, :], values, (mine < width)[None, :])


@triton.jit(do_not_specialize=["slots", "experts"])
def _down_held(hidden: Pointer, chosen: Pointer, offsets: Pointer, down: Pointer, down_apart: Pointer, common: Pointer,
               last: Together, out: Pointer, slots: int, experts: int, rows: int, subs: int, cols: int, row_bytes: int,
               apart_cols: int, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr,
               ROWS: tl.constexpr, SUBS: tl.constexpr, KIND: tl.constexpr) -> None:
    """A program owns some outputs of a token and walks through its experts, those that are held, and the shared one. common:
    that one's hidden values; KIND its format, fields, lanes and subs."""
    token, one = tl.program_id(1).to(tl.int64), tl.arange(0, 1)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = down_rows(hidden, chosen, offsets, down, down_apart, own, token, slots, experts, rows, subs, cols, row_bytes,
                     apart_cols, FORMAT, FIELDS, LANES, UNIT, ROWS, SUBS, True)[None, :]
    data, apart, own_subs, own_cols, own_bytes, own_apart = last
    sums += few_sums(common + token * own_cols, data, apart, common, 0.0, own, one, 0, 1, 1, rows, own_subs, own_cols, own_bytes,
                     own_apart, KIND[0], KIND[1], KIND[2], 1, ROWS, KIND[3], False)
    tl.store(out + token * rows + own[None, :], sums, (own < rows)[None, :])


@triton.jit
def _join(out: Pointer, part: Pointer, given: Together, d: int, COLS: tl.constexpr, S: tl.constexpr, M: tl.constexpr) -> None:
    token, one = tl.program_id(1), tl.arange(0, 1)
    own = tl.program_id(0) * COLS + tl.arange(0, COLS)
    place = token.to(tl.int64) * d + own
    whole = tl.load(out + place, own < d, 0.0) + tl.load(part + place, own < d, 0.0)
    join(whole[None, :], own, token + one, given, tl.program_id(0), tl.num_programs(0), tl.num_programs(1), d, 1, COLS, S, M)


def _cases() -> tuple[Case, ...]:
    """The sizes of Flash, in the formats that are routed."""
    sizes = "i32:16 i32:16 i32:16 i32:16 i32"
    found = [Case(_join, "*fp32 *fp32 (*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32) i32:16", {"COLS": COLS, "S": 4, "M": 32})]
    for by in ("*fp32", "*i64"):
        found.append(Case(_choose_and_tell, f"*fp32 {by} *i64 *fp32 *fp32 *i64 *fp32 *fp32 *i64 i32:16 i32:16 i32 i32:16 fp32",
                          {"HASHED": by == "*i64", "N": 256, "K": 8, "WIDTH": 1024}, warps=1))
    for name, other in (("mxfp4", "q8_0"), ("fp4", "fp8_e4m3"), ("q4_k", "q8_0"), ("q2_k", "q8_0"), ("iq2_xxs", "q8_0")):
        layout, last, apart = LAYOUTS[name], LAYOUTS[other], {"iq2_xxs": "*i32"}.get(name, "*u8")
        about = {"FORMAT": name, "FIELDS": layout.fields, "LANES": layout.lanes, "UNIT": UNIT}
        rows, subs = few_tile(layout, 1, 64, 2048, default("moe.hidden_few"))
        kind = (other, *last, *few_tile(last, 1, 64, 2048, default("moe.hidden_few")))
        found.append(Case(_hidden_held, f"*fp32 *fp32 *i64 *i64 *u8 {apart} *u8 {apart} *fp32 "
                          f"(*u8 *u8 *u8 *u8 *fp32 i32:16 i32:16 i32:16 i32) i32 i32 {sizes} fp32",
                          {**about, "ROWS": rows, "SUBS": subs, "KIND": kind}))
        rows, subs = few_tile(layout, 1, 64, 4096, default("moe.down_few"))
        own = (other, *last, few_tile(last, 1, 64, 4096, default("moe.down_few"))[1])
        found.append(Case(_down_held, f"*fp32 *i64 *i64 *u8 {apart} *fp32 (*u8 *u8 i32:16 i32:16 i32:16 i32) *fp32 i32 i32 "
                          f"{sizes}", {**about, "ROWS": rows, "SUBS": subs, "KIND": own}))
    return tuple(found)


AHEAD = _cases()
