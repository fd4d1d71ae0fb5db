"""The end of a sublayer in Triton.

Up to FEW tokens whoever computes rows of the last product adds them to the same rows of all streams, and leaves behind what
these rows are worth in the next mixture: its 24 products and the squares, a part for each program, which the mixer adds up in
one order. The experts are three launches: the router's scores beside the shared expert's hidden values; the routed ones'
hidden values, by programs that each choose the token's experts again, which is cheaper than a launch; all ways down. More
tokens, and what has no kernel, take one launch after the other, as each operation has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, Together, dense, in_order, padded
from dsv4_kernels.hyper.gpu import spread_streams
from dsv4_kernels.linear import Weight
from dsv4_kernels.linear.gpu import FEW, few_sums, few_tile, kind_of, linear, met_by_few
from dsv4_kernels.moe import Expert
from dsv4_kernels.moe.gpu import Bank, alike, bank_of, down_rows, hidden_rows, routed_experts, shared_expert
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.router import Router, gpu, routed
from dsv4_kernels.router.gpu import score
from dsv4_kernels.tuned import default, options, tuned
from dsv4_kernels.unpack import LAYOUTS, Matrix, matrix

KERNEL = "residual.score"  # whose tiles the router and the shared expert share


def project_into_streams(x: Tensor, weight: Weight, residual: Residual) -> Joined:
    found = matrix(weight)
    if found is None or not _few(x, residual):
        return Joined(spread_streams(linear(x, weight), *residual[:3]))
    tokens, sizes = len(x), tuned("residual.project", x.device, found.format)
    rows, subs = few_tile(found.layout, tokens, found.subs, found.rows, sizes)
    programs = triton.cdiv(found.rows, rows)
    made, given, constants = joined(residual, programs)
    _project[(programs,)](dense(x), found.data, found.apart, given, tokens, found.rows, found.subs, found.cols, found.row_bytes,
                          found.apart_cols, FORMAT=found.format, FIELDS=found.layout.fields, LANES=found.layout.lanes,
                          TOKENS=padded(tokens), ROWS=rows, SUBS=subs, **constants, **options(sizes))
    return made


def experts_into_streams(x: Tensor, ids: Tensor, router: Router, shared: Expert, experts: Sequence[Expert], limit: float,
                         residual: Residual, told: Tensor | None = None) -> Joined:
    known = _known(router, shared, experts) if _few(x, residual) and ids.dtype == int64 else None
    if known is None:
        shares, chosen = routed(gpu, x, router, ids)
        if told is not None:
            told.copy_(chosen)
        out = routed_experts(x, shares, chosen, experts, limit, shared_expert(x, shared, limit))
        return Joined(spread_streams(out, *residual[:3]))
    x = dense(x)
    logits, common = _scored(x, known, limit)
    hidden, chosen = _hidden_of(x, logits, dense(ids), router, known.bank, limit, told)
    return _back(hidden, chosen, common, known, residual)


class Known(NamedTuple):
    """What a layer's experts are to the kernels."""

    gate: Matrix  # the router's
    bank: Bank
    common: Bank  # of the shared expert alone


def _known(router: Router, shared: Expert, experts: Sequence[Expert]) -> Known | None:
    scores, (gate, up, down), bank = matrix(router.gate), map(matrix, shared), bank_of(experts)
    by = router.bias if router.table is None else router.table
    if (scores is None or gate is None or up is None or down is None or bank is None or not alike(gate, up) or by is None
            or by.dtype != (float32 if router.table is None else int64)):
        return None
    return Known(scores, bank, Bank(gate, up, down, bank.offsets, 1))


def _few(x: Tensor, residual: Residual) -> bool:
    return 0 < len(x) <= FEW and all(each.dtype == float32 for each in (x, *residual))


def joined(residual: Residual, programs: int) -> tuple[Joined, tuple[Tensor | int, ...], dict[str, int]]:
    """Where it is to go, and the arguments and constants that `join` needs."""
    streams, post, across, fn = residual
    (t, s, d), m = streams.shape, fn.shape[0]
    new, sums = alloc.empty((t, s, d), float32, streams.device), alloc.empty((t, m + 1, programs), float32, streams.device)
    given = (dense(streams), dense(post), dense(across), dense(fn), new, sums, m)
    return Joined(new, sums), given, {"S": s, "M": padded(m)}


def _scored(x: Tensor, known: Known, limit: float) -> tuple[Tensor, Tensor]:
    """The router's products [t, experts], and the shared expert's hidden values [t, width]."""
    (tokens, cols), scores, (gate, up, *_) = x.shape, known.gate, known.common
    logits, hidden = (alloc.empty((tokens, w.rows), float32, x.device) for w in (scores, gate))
    kinds = (kind_of(scores, tokens, KERNEL), halved(kind_of(gate, tokens, KERNEL), tokens))
    _score[(triton.cdiv(scores.rows, kinds[0][3]) + triton.cdiv(gate.rows, kinds[1][3]),)](
        x, (scores.data, scores.apart, logits, scores.rows, scores.subs, scores.row_bytes, scores.apart_cols),
        (gate.data, gate.apart, up.data, up.apart, hidden, gate.rows, gate.subs, gate.row_bytes, gate.apart_cols), tokens, cols,
        limit, KINDS=kinds, TOKENS=padded(tokens), **options(tuned(KERNEL, x.device)))
    return logits, hidden


def halved(kind: tuple[str, int, int, int, int], tokens: int) -> tuple[str, int, int, int, int]:
    """Half the rows for more tokens: hidden values come of two rows each, whose sums take registers."""
    name, fields, lanes, rows, subs = kind
    return name, fields, lanes, max(1, rows // 2) if tokens > 4 else rows, subs


def _hidden_of(x: Tensor, logits: Tensor, ids: Tensor, router: Router, bank: Bank, limit: float,
               told: Tensor | None) -> tuple[Tensor, Tensor]:
    """The chosen experts' hidden values [t * k, width], with their shares; and which experts they are, int64 [t, k], which is
    `told` if that is given."""
    tokens, gate, hashed = len(x), bank.gate, router.table is not None
    by = router.bias if router.table is None else router.table
    assert by is not None, "a layer is routed by a table or by a bias"
    slots = by.shape[1] if hashed else router.k
    hidden = alloc.empty((tokens * slots, gate.rows), float32, x.device)
    chosen = alloc.empty((tokens, slots), int64, x.device) if told is None else told
    sizes = tuned("residual.hide", x.device, gate.format)
    rows, subs = few_tile(gate.layout, 1, gate.subs, gate.rows, sizes)
    _choose_and_hide[(triton.cdiv(gate.rows, rows), tokens * slots)](
        x, logits, dense(by), ids, bank.offsets, gate.data, gate.apart, bank.up.data, bank.up.apart, hidden, chosen, slots,
        bank.experts, len(by), router.scale, gate.rows, gate.subs, gate.cols, gate.row_bytes, gate.apart_cols, limit,
        HASHED=hashed, N=padded(bank.experts), K=padded(slots), FORMAT=gate.format, FIELDS=gate.layout.fields,
        LANES=gate.layout.lanes, UNIT=bank.unit, ROWS=rows, SUBS=subs, **options(sizes))
    return hidden, chosen


def _back(hidden: Tensor, chosen: Tensor, common: Tensor, known: Known, residual: Residual) -> Joined:
    (tokens, slots), down, last, bank = chosen.shape, known.bank.down, known.common.down, known.bank
    sizes = tuned("residual.down", hidden.device, down.format)
    rows, subs = few_tile(down.layout, 1, down.subs, down.rows, sizes)
    kind = (last.format, *last.layout, few_tile(last.layout, 1, last.subs, last.rows, sizes)[1])
    programs = triton.cdiv(down.rows, rows)
    made, given, constants = joined(residual, programs)
    _down[(programs, tokens)](
        hidden, chosen, bank.offsets, down.data, down.apart, common,
        (last.data, last.apart, last.subs, last.cols, last.row_bytes, last.apart_cols), given, slots, bank.experts, down.rows,
        down.subs, down.cols, down.row_bytes, down.apart_cols, FORMAT=down.format, FIELDS=down.layout.fields,
        LANES=down.layout.lanes, UNIT=bank.unit, ROWS=rows, SUBS=subs, KIND=kind, **constants, **options(sizes))
    return made


@triton.jit
def join(out: Block, own: Block, token: Block, given: Together, program: int, programs: int, tokens: int, d: int,
         TOKENS: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, M: tl.constexpr) -> None:
    """Adds a sublayer's output [TOKENS, ROWS], its columns `own`, to the streams there, and sums for the next mixer."""
    streams, post, across, fn, new, sums, m = given
    token = token.to(tl.int64)
    first, number = token * S, tl.arange(0, M)
    inside = (token < tokens)[:, None] & (own < d)[None, :]
    products = tl.zeros((TOKENS, M, ROWS), tl.float32)
    squares = tl.zeros((TOKENS, ROWS), tl.float32)
    for target in tl.static_range(S):
        total = tl.load(post + first + target, token < tokens, 0.0)[:, None] * out
        for source in tl.static_range(S):
            share = tl.load(across + (first + source) * S + target, token < tokens, 0.0)[:, None]
            total += share * tl.load(streams + (first + source)[:, None] * d + own[None, :], inside, 0.0)
        tl.store(new + (first + target)[:, None] * d + own[None, :], total, inside)
        weights = tl.load(fn + (number[:, None] * S + target) * d + own[None, :], (number < m)[:, None] & (own < d)[None, :], 0.0)
        total = tl.where(inside, total, 0.0)
        products += total[:, None, :] * weights[None]
        squares += total * total
    to = sums + (token * (m + 1))[:, None] * programs + program
    tl.store(to + number[None, :] * programs, tl.sum(products, 2), (token < tokens)[:, None] & (number < m)[None, :])
    tl.store(to + m * programs, tl.sum(squares, 1)[:, None], (token < tokens)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _project(x: Pointer, data: Pointer, apart: Pointer, given: Together, tokens: int, rows: int, subs: int, cols: int,
             row_bytes: int, apart_cols: int, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
             TOKENS: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr, S: tl.constexpr, M: tl.constexpr) -> None:
    """As `linear._few`, and then the rows join the streams."""
    own, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    out = few_sums(x, data, apart, x, 0.0, own, token, 0, 1, tokens, rows, subs, cols, row_bytes, apart_cols, FORMAT, FIELDS,
                   LANES, TOKENS, ROWS, SUBS, False)
    join(out, own, token, given, tl.program_id(0), tl.num_programs(0), tokens, rows, TOKENS, ROWS, S, M)


@triton.jit(do_not_specialize=["tokens"])
def _score(x: Pointer, scores: Together, shared: Together, tokens: int, cols: int, limit: float, KINDS: tl.constexpr,
           TOKENS: tl.constexpr) -> None:
    """Programs of the router's rows, then those of the shared expert's. KINDS: as of `linear._several`."""
    program = tl.program_id(0)
    data, apart, out, rows, subs, row_bytes, apart_cols = scores
    programs = tl.cdiv(rows, KINDS[0][3])
    if program < programs:
        met_by_few(x, data, apart, out, x, 0.0, program, 0, 1, tokens, rows, subs, cols, row_bytes, apart_cols, KINDS[0][0],
                   KINDS[0][1], KINDS[0][2], TOKENS, KINDS[0][3], KINDS[0][4], False)
    else:
        gate, gate_apart, up, up_apart, hidden, width, subs, row_bytes, apart_cols = shared
        own, token = (program - programs) * KINDS[1][3] + tl.arange(0, KINDS[1][3]), tl.arange(0, TOKENS)
        values = hidden_rows(x, gate, gate_apart, up, up_apart, own, token, tokens, width, subs, cols, row_bytes, apart_cols,
                             limit, KINDS[1][0], KINDS[1][1], KINDS[1][2], TOKENS, KINDS[1][3], KINDS[1][4])
        tl.store(hidden + token.to(tl.int64)[:, None] * width + own[None, :], values,
                 (token < tokens)[:, None] & (own < width)[None, :])


@triton.jit
def _learned(logits: Pointer, bias: Pointer, slot: int, n: int, k: int, N: tl.constexpr) -> tuple[Block, Block]:
    """(expert, its share but for the scale) of a token's slot: greatest sum of score and bias first, of equal ones the lower."""
    expert = tl.arange(0, N)
    scores = score(tl.load(logits + expert, expert < n, 0.0)) + tl.load(bias + expert, expert < n, 0.0)
    order = tl.where(expert < n, in_order(scores).to(tl.int64) * N + (N - 1 - expert), -(1 << 62))
    total, mine, own = 0.0, 0, 0.0
    for i in range(k):
        best = tl.max(order, 0)
        order = tl.where(order == best, -(1 << 62), order)
        number = N - 1 - (best & (N - 1)).to(tl.int32)
        value = score(tl.load(logits + number))
        total += value
        mine = tl.where(i == slot, number, mine)
        own = tl.where(i == slot, value, own)
    return mine, own / total


@triton.jit
def _looked_up(logits: Pointer, table: Pointer, number: Block, slot: int, n: int, vocabulary: int, k: int,
               K: tl.constexpr) -> tuple[Block, Block]:
    """The same of a hash table. What it does not have is expert 0, and no number."""
    place = tl.arange(0, K)
    known = (number >= 0) & (number < vocabulary)
    expert = tl.load(table + number * k + place, (place < k) & known, -1)
    known = (expert >= 0) & (expert < n)
    scores = tl.where(known, score(tl.load(logits + expert, known, 0.0)), float("nan"))
    scores = tl.where(place < k, scores, 0.0)
    mine = tl.sum(tl.where((place == slot) & known, expert, 0), 0).to(tl.int32)
    return mine, tl.sum(tl.where(place == slot, scores, 0.0), 0) / tl.sum(scores, 0)


@triton.jit(do_not_specialize=["slots", "experts", "vocabulary"])
def _choose_and_hide(x: Pointer, logits: Pointer, by: Pointer, ids: Pointer, offsets: Pointer, gate: Pointer, gate_apart: Pointer,
                     up: Pointer, up_apart: Pointer, hidden: Pointer, chosen: Pointer, slots: int, experts: int, vocabulary: int,
                     scale: float, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, limit: float,
                     HASHED: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, FIELDS: tl.constexpr,
                     LANES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr) -> None:
    """As `moe._hidden_few`, of an expert that the program finds itself. by: the router's table if HASHED, else its bias."""
    pair = tl.program_id(1).to(tl.int64)
    token, slot = pair // slots, (pair % slots).to(tl.int32)
    if HASHED:
        number = tl.load(ids + token) + tl.zeros((K,), tl.int64)
        expert, share = _looked_up(logits + token * experts, by, number, slot, experts, vocabulary, slots, K)
    else:
        expert, share = _learned(logits + token * experts, by, slot, experts, slots, N)
    if tl.program_id(0) == 0:
        tl.store(chosen + pair, expert.to(tl.int64))
    offset = offsets + expert
    gate += tl.load(offset) * UNIT
    up += tl.load(offset + experts) * UNIT
    gate_apart += tl.load(offset + 3 * experts)
    up_apart += tl.load(offset + 4 * experts)
    own, one = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 1)
    values = hidden_rows(x + token * cols, gate, gate_apart, up, up_apart, own, one, 1, rows, subs, cols, row_bytes, apart_cols,
                         limit, FORMAT, FIELDS, LANES, 1, ROWS, SUBS)
    tl.store(hidden + pair * rows + own[None, :], values * (share * scale), (own < rows)[None, :])


@triton.jit(do_not_specialize=["slots", "experts"])
def _down(hidden: Pointer, chosen: Pointer, offsets: Pointer, down: Pointer, down_apart: Pointer, common: Pointer, last: Together,
          given: Together, slots: int, experts: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int,
          FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
          SUBS: tl.constexpr, KIND: tl.constexpr, S: tl.constexpr, M: tl.constexpr) -> None:
    """As `moe._down_few`, and the shared expert's way down (`common` are its hidden values, KIND its format, fields, lanes and
    subs); then the rows join the streams."""
    token, one = tl.program_id(1), tl.arange(0, 1)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = down_rows(hidden, chosen, offsets, down, down_apart, own, token, slots, experts, rows, subs, cols, row_bytes,
                    apart_cols, FORMAT, FIELDS, LANES, UNIT, ROWS, SUBS, False)[None, :]
    data, apart, own_subs, own_cols, own_bytes, own_apart = last
    out += few_sums(common + token.to(tl.int64) * own_cols, data, apart, common, 0.0, own, one, 0, 1, 1, rows, own_subs, own_cols,
                    own_bytes, own_apart, KIND[0], KIND[1], KIND[2], 1, ROWS, KIND[3], False)
    join(out, own, token + one, given, tl.program_id(0), tl.num_programs(0), tl.num_programs(1), rows, 1, ROWS, S, M)


def _cases() -> tuple[Case, ...]:
    """The sizes of Flash: dense matrices in Q8_0 or FP8, experts in the formats that are routed."""
    join, sizes = "(*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32)", "i32:16 i32:16 i32:16 i32:16 i32"
    found = []
    for tokens, name in ((1, "q8_0"), (8, "q8_0"), (1, "fp8_e4m3")):
        layout = LAYOUTS[name]
        rows, subs = few_tile(layout, tokens, 256, 4096, default("residual.project"))
        found.append(Case(_project, f"*fp32 *u8 *u8 {join} i32 {sizes}", {
            "FORMAT": name, "FIELDS": layout.fields, "LANES": layout.lanes, "TOKENS": padded(tokens), "ROWS": rows, "SUBS": subs,
            "S": 4, "M": 32}))
        kinds = tuple((each, *LAYOUTS[each], *few_tile(LAYOUTS[each], tokens, 128, 1024, default(KERNEL)))
                      for each in ("bf16" if name == "fp8_e4m3" else "f32", name))
        kinds = (kinds[0], halved(kinds[1], tokens))
        found.append(Case(_score, "*fp32 (*u8 *u8 *fp32 i32:16 i32:16 i32:16 i32) "
                          "(*u8 *u8 *u8 *u8 *fp32 i32:16 i32:16 i32:16 i32) i32 i32:16 fp32",
                          {"KINDS": kinds, "TOKENS": padded(tokens)}))
    for name, other, hashed in (("mxfp4", "q8_0", False), ("fp4", "fp8_e4m3", True), ("q4_k", "q8_0", False),
                                ("q2_k", "q8_0", False), ("iq2_xxs", "q8_0", False)):
        layout, last, apart = LAYOUTS[name], LAYOUTS[other], {"iq2_xxs": "*i32"}.get(name, "*u8")
        rows, subs = few_tile(layout, 1, 64, 2048, default("residual.hide"))
        about = {"FORMAT": name, "FIELDS": layout.fields, "LANES": layout.lanes, "UNIT": 16, "ROWS": rows, "SUBS": subs}
        by = "*i64" if hashed else "*fp32"
        found.append(Case(_choose_and_hide, f"*fp32 *fp32 {by} *i64 *i64 *u8 {apart} *u8 {apart} *fp32 *i64 i32 i32 i32 fp32 "
                          f"{sizes} fp32", {"HASHED": hashed, "N": 256, "K": 8, **about}))
        kind = (other, *last, few_tile(last, 1, 64, 4096, default("residual.down"))[1])
        found.append(Case(_down, f"*fp32 *i64 *i64 *u8 {apart} *fp32 (*u8 *u8 i32:16 i32:16 i32:16 i32) {join} i32 i32 {sizes}",
                          {**about, "KIND": kind, "S": 4, "M": 32}))
    return tuple(found)


AHEAD = _cases()
