"""Matrix products in Triton, straight on the bytes of the file.

Up to FEW tokens: a program owns some rows, unpacks them once and meets all tokens with them in float32; the columns are split
among its threads and summed in one order, so the result is the same every time. More tokens: a program owns a tile of tokens and
rows; weights are unpacked in the kernel, rounded to bf16 like the activations, and multiplied by tensor cores into float32 sums;
exact weights are multiplied in float32. What has no kernel (another format, activations that are not float32) goes the way of
`ref`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import DOT, Block, Pointer, Together, dense, padded
from dsv4_kernels.linear import Norm, Weight, ref
from dsv4_kernels.norm_rope.gpu import rms_norm
from dsv4_kernels.tuned import Sizes, default, options, tuned
from dsv4_kernels.unpack import LAYOUTS, Layout, Matrix, matrix
from dsv4_kernels.unpack.gpu import columns, met, multiplied, unpacked

FEW = 8  # tokens that still meet their weights without tensor cores


def linear(x: Tensor, weight: Weight) -> Tensor:
    found = matrix(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return ref.linear(x, weight)
    x = dense(x)
    out = alloc.empty((*x.shape[:-1], found.rows), float32, x.device)
    _multiply(x, found, 1, out)
    return out


def linears(x: Tensor, weights: Sequence[Weight], norm: Norm | None = None) -> list[Tensor]:
    known = [found for weight in weights if (found := matrix(weight)) is not None]
    tokens = x.numel() // max(1, x.shape[-1])
    if (len(known) < len(weights) or not known or x.dtype != float32 or not 0 < tokens <= FEW
            or (norm is not None and norm.weight.dtype != float32)):
        x = x if norm is None else rms_norm(x, *norm)
        return [linear(x, weight) for weight in weights]
    x = dense(x)
    out = [alloc.empty((*x.shape[:-1], found.rows), float32, x.device) for found in known]
    kinds = tuple(kind_of(found, tokens) for found in known)
    _several[(sum(triton.cdiv(found.rows, kind[3]) for found, kind in zip(known, kinds, strict=True)),)](
        x, tuple((w.data, w.apart, to, w.rows, w.subs, w.row_bytes, w.apart_cols) for w, to in zip(known, out, strict=True)),
        x if norm is None else dense(norm.weight), 0.0 if norm is None else norm.eps, tokens, x.shape[-1], KINDS=kinds,
        TOKENS=padded(tokens), NORMED=norm is not None, **options(tuned("linear.several", x.device)))
    return out


def grouped_linear(x: Tensor, weight: Weight) -> Tensor:
    found = matrix(weight)
    if found is None or x.dtype != float32 or not x.numel():
        return ref.grouped_linear(x, weight)
    x, (tokens, groups, _) = dense(x), x.shape
    out = alloc.empty((tokens, groups, found.rows // groups), float32, x.device)
    _multiply(x, found, groups, out)
    return out


def embed(ids: Tensor, table: Weight, times: int | None = None) -> Tensor:
    found = matrix(table)
    if found is None or ids.dtype != int64 or not ids.numel() or (isinstance(table, Tensor) and table.dtype != float32):
        return ref.embed(ids, table, times)
    out = alloc.empty((ids.shape[0], found.cols), float32, ids.device)
    subs = padded(min(found.subs, 1024 // found.layout.lanes))
    _embed[(ids.shape[0], triton.cdiv(found.subs, subs))](
        dense(ids), found.data, found.apart, out, found.subs, found.cols, found.row_bytes, found.apart_cols,
        FORMAT=found.format, FIELDS=found.layout.fields, LANES=found.layout.lanes, SUBS=subs)
    return ref.repeated(out, times)


def few_tile(layout: Layout, tokens: int, subs: int, rows: int, sizes: Sizes) -> tuple[int, int]:
    """(rows, subs) of a program for few tokens: whole rows of threads where there are so many columns, fewer rows for more
    tokens, whose sums take registers too, and for small matrices, so that every processor of the card has a program."""
    most = sizes["rows"]
    return max(1, most // 2 if tokens > 4 or rows < 1024 else most), padded(min(subs, sizes["lanes"] // layout.lanes))


def kind_of(w: Matrix, tokens: int, kernel: str = "linear.several") -> tuple[str, int, int, int, int]:
    """What a launch for several matrices is compiled for of each: format, fields, lanes, and the tile of a program."""
    return (w.format, *w.layout, *few_tile(w.layout, tokens, w.subs, w.rows, tuned(kernel, w.data.device, w.format)))


def many_tile(w: Layout, tokens: int, exact: bool, sizes: Sizes) -> tuple[int, int, int]:
    """(tokens, rows, subs) of a program for many tokens. All fields of a tile are unpacked before its first one is done with, so
    formats of several fields have narrower tiles, or their registers would spill; so have float32 products."""
    if exact:
        return min(32, padded(tokens, 16)), 32, 32 // w.lanes
    return min(sizes["tokens"], padded(tokens, 16)), sizes["rows"], sizes["columns"] // (1 if w.fields == 1 else 2) // w.lanes


def _multiply(x: Tensor, w: Matrix, groups: int, out: Tensor) -> None:
    tokens, rows = x.numel() // (groups * w.cols), w.rows // groups
    sizes = (tokens, rows, w.subs, w.cols, w.row_bytes, w.apart_cols)
    layout = w.layout
    if tokens <= FEW:
        found = tuned("linear.few", x.device, w.format)
        own, subs = few_tile(layout, tokens, w.subs, rows, found)
        _few[(triton.cdiv(rows, own), groups)](x, w.data, w.apart, out, *sizes, FORMAT=w.format, FIELDS=layout.fields,
                                               LANES=layout.lanes, TOKENS=padded(tokens), ROWS=own, SUBS=subs, **options(found))
        return
    found = tuned("linear.many", x.device, w.format)
    m, n, subs = many_tile(layout, tokens, w.exact, found)
    _many[(triton.cdiv(tokens, m), triton.cdiv(rows, n), groups)](
        x, w.data, w.apart, out, *sizes, FORMAT=w.format, FIELDS=layout.fields, LANES=layout.lanes, M=m, N=n, SUBS=subs,
        EXACT=w.exact, DOT=DOT, **options(found))


@triton.jit(do_not_specialize=["tokens"])
def _few(x: Pointer, data: Pointer, apart: Pointer, out: Pointer, tokens: int, rows: int, subs: int, cols: int, row_bytes: int,
         apart_cols: int, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
         ROWS: tl.constexpr, SUBS: tl.constexpr) -> None:
    met_by_few(x, data, apart, out, x, 0.0, tl.program_id(0), tl.program_id(1), tl.num_programs(1), tokens, rows, subs, cols,
               row_bytes, apart_cols, FORMAT, FIELDS, LANES, TOKENS, ROWS, SUBS, False)


@triton.jit(do_not_specialize=["tokens"])
def _several(x: Pointer, matrices: Together, norm: Pointer, eps: float, tokens: int, cols: int, KINDS: tl.constexpr,
             TOKENS: tl.constexpr, NORMED: tl.constexpr) -> None:
    """Several matrices that have nothing in common but their columns; each has its own programs, one after the other's.
    KINDS: of each (FORMAT, FIELDS, LANES, ROWS, SUBS). With NORMED every program norms what it reads, which is little."""
    program = tl.program_id(0)
    for each in tl.static_range(len(KINDS)):
        data, apart, out, rows, subs, row_bytes, apart_cols = matrices[each]
        programs = tl.cdiv(rows, KINDS[each][3])
        if (program >= 0) & (program < programs):
            met_by_few(x, data, apart, out, norm, eps, program, 0, 1, tokens, rows, subs, cols, row_bytes, apart_cols,
                       KINDS[each][0], KINDS[each][1], KINDS[each][2], TOKENS, KINDS[each][3], KINDS[each][4], NORMED)
        program -= programs


@triton.jit
def met_by_few(x: Pointer, data: Pointer, apart: Pointer, out: Pointer, norm: Pointer, eps: float, program: int, group: int,
               groups: int, tokens: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, FORMAT: tl.constexpr,
               FIELDS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
               NORMED: tl.constexpr) -> None:
    """The `program`-th ROWS rows of a group's matrix, times every token's activations of that group."""
    own, token = program * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    sums = few_sums(x, data, apart, norm, eps, own, token, group, groups, tokens, rows, subs, cols, row_bytes, apart_cols, FORMAT,
                    FIELDS, LANES, TOKENS, ROWS, SUBS, NORMED)
    to = (token.to(tl.int64) * groups + group)[:, None] * rows + own[None, :]
    tl.store(out + to, sums, (token < tokens)[:, None] & (own < rows)[None, :])


@triton.jit
def few_sums(x: Pointer, data: Pointer, apart: Pointer, norm: Pointer, eps: float, own: Block, token: Block, group: int,
             groups: int, tokens: int, rows: int, subs: int, cols: int, row_bytes: int, apart_cols: int, FORMAT: tl.constexpr,
             FIELDS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SUBS: tl.constexpr,
             NORMED: tl.constexpr) -> Block:
    """float32 [TOKENS, ROWS]: the rows `own` of a group's matrix times the tokens' activations, or these normed by `norm`. The
    norm's own factor is one for each token, so it comes last."""
    row = (group * rows + own).to(tl.int64)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    vectors = x + (token.to(tl.int64) * groups + group)[:, None, None, None] * cols
    total = tl.zeros((TOKENS, ROWS, SUBS, LANES), tl.float32)
    squares = tl.zeros((TOKENS, 1, SUBS, LANES), tl.float32)
    for first in range(0, subs, SUBS):
        sub = first + tl.arange(0, SUBS)[None, :, None]
        inside = (own < rows)[:, None, None] & (sub < subs)
        for FIELD in tl.static_range(FIELDS):
            weight = unpacked(FORMAT, FIELD, data, apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
            column = columns(FORMAT, FIELD, sub, lane)[None]
            value = tl.load(vectors + column, (token < tokens)[:, None, None, None] & (column < cols), 0.0)
            if NORMED:
                squares += value * value
                value *= tl.load(norm + column, column < cols, 0.0)
            total += weight[None] * value
    sums = tl.sum(tl.sum(total, 3), 2)
    if NORMED:
        sums *= tl.rsqrt(tl.sum(tl.sum(squares, 3), 2) / cols + eps)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _many(x: Pointer, data: Pointer, apart: Pointer, out: Pointer, tokens: int, rows: int, subs: int, cols: int, row_bytes: int,
          apart_cols: int, FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
          SUBS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr) -> None:
    group, groups = tl.program_id(2), tl.num_programs(2)
    token = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    own = tl.program_id(1) * N + tl.arange(0, N)
    row = (group * rows + own).to(tl.int64)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    vectors = x + (token.to(tl.int64) * groups + group) * cols
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, subs, SUBS):
        sub = first + tl.arange(0, SUBS)[None, :, None]
        inside = (own < rows)[:, None, None] & (sub < subs)
        for FIELD in tl.static_range(FIELDS):
            weight = unpacked(FORMAT, FIELD, data, apart, row, sub, lane, inside, cols, row_bytes, apart_cols)
            total = multiplied(met(FORMAT, FIELD, vectors, token < tokens, first, cols, SUBS * LANES, LANES), weight, total,
                               EXACT, DOT)
    to = (token.to(tl.int64) * groups + group) * rows + own[None, :]
    tl.store(out + to, total, (token < tokens) & (own < rows)[None, :])


@triton.jit
def _embed(ids: Pointer, data: Pointer, apart: Pointer, out: Pointer, subs: int, cols: int, row_bytes: int, apart_cols: int,
           FORMAT: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, SUBS: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token) + tl.zeros((1, 1, 1), tl.int64)
    sub, lane = tl.program_id(1) * SUBS + tl.arange(0, SUBS)[None, :, None], tl.arange(0, LANES)[None, None, :]
    for FIELD in tl.static_range(FIELDS):
        column = columns(FORMAT, FIELD, sub, lane)
        values = unpacked(FORMAT, FIELD, data, apart, row, sub, lane, sub < subs, cols, row_bytes, apart_cols)
        tl.store(out + token * cols + column, values, (sub < subs) & (column < cols))


def _cases() -> tuple[Case, ...]:
    """The sizes of Flash, for formats that are not those of its experts."""
    found = []
    sizes = "i32 i32:16 i32:16 i32:16 i32:16 i32"
    for name in ("f32", "bf16", "fp8_e4m3", "q8_0", "q6_k", "q5_k", "q3_k"):
        layout = LAYOUTS[name]
        about = {"FORMAT": name, "FIELDS": layout.fields, "LANES": layout.lanes}
        for tokens in (1, 8) if name == "q8_0" else (1,):
            rows, subs = few_tile(layout, tokens, 128, 4096, default("linear.few"))
            found.append(Case(_few, f"*fp32 *u8 *u8 *fp32 {sizes}", {**about, "TOKENS": tokens, "ROWS": rows, "SUBS": subs}))
        exact = name == "f32"
        m, n, subs = many_tile(layout, 512, exact, default("linear.many"))
        found.append(Case(_many, f"*fp32 *u8 *u8 *fp32 {sizes}",
                          {**about, "M": m, "N": n, "SUBS": subs, "EXACT": exact, "DOT": DOT}))
    found += [_together(1, "q8_0", "q8_0", "f16", "f16"), _together(8, "q8_0", "f32"), _together(1, "fp8_e4m3", "f32"),
              _together(1, "q8_0", "q8_0", normed=True), _together(8, "q8_0", normed=True)]
    found.append(Case(_embed, "*i64 *u8 *u8 *fp32 i32:16 i32:16 i32:16 i32",
                      {"FORMAT": "q8_0", "FIELDS": 1, "LANES": 32, "SUBS": 32}))
    return tuple(found)


def _together(tokens: int, *formats: str, normed: bool = False) -> Case:
    layouts = [LAYOUTS[name] for name in formats]
    kinds = tuple((name, *layout, *few_tile(layout, tokens, 4096 // layout.columns, 1024, default("linear.several")))
                  for name, layout in zip(formats, layouts, strict=True))
    one = "(*u8 *u8 *fp32 i32:16 i32:16 i32:16 i32)"
    return Case(_several, f"*fp32 ({' '.join([one] * len(kinds))}) *fp32 fp32 i32 i32:16",
                {"KINDS": kinds, "TOKENS": padded(tokens), "NORMED": normed})


AHEAD = _cases()
