"""A tile of any packed matrix as float32, in Triton: what every product with packed weights begins with.

Tiles are [rows, subs, lanes] (see the package); what a sub's lanes have in common, its scales, is loaded and unpacked once for
all of them. Loads outside of the matrix are masked, and what they stand for is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_kernels.gpu import Block, Pointer


@triton.jit
def columns(FORMAT: tl.constexpr, FIELD: tl.constexpr, sub: Block, lane: Block) -> Block:
    """Which columns of the matrix the lanes of subs are, for a field of their bytes."""
    if FORMAT == "mxfp4":
        column = sub * 32 + FIELD * 16 + lane
    elif FORMAT == "fp4":
        column = sub * 32 + lane * 2 + FIELD
    elif FORMAT == "q4_k" or FORMAT == "q5_k":
        column = sub * 64 + FIELD * 32 + lane
    elif FORMAT == "q2_k" or FORMAT == "q3_k" or FORMAT == "q6_k":  # two subs make the 128 columns of 32 bytes
        column = sub // 2 * 128 + FIELD * 32 + sub % 2 * 16 + lane
    elif FORMAT == "iq2_xxs":
        column = sub * 8 + lane
    else:
        column = sub * 32 + lane
    return column


@triton.jit
def unpacked(FORMAT: tl.constexpr, FIELD: tl.constexpr, data: Pointer, apart: Pointer, row: Block, sub: Block, lane: Block,
             inside: Block, cols: int, row_bytes: int, apart_cols: int) -> Block:
    """float32 [rows, subs, lanes]: a field of these subs of these rows. row int64 [rows, 1, 1], sub [1, subs, 1], lane [1, 1,
    lanes], inside [rows, subs, 1]: what of it is there."""
    at = data + row * row_bytes
    if FORMAT == "q8_0":
        at += sub * 34
        values = _half(at, inside) * tl.load((at + 2 + lane).to(tl.pointer_type(tl.int8)), inside, 0).to(tl.float32)
    elif FORMAT == "mxfp4":
        at += sub * 17
        values = _fp4(_byte(at + 1 + lane, inside) >> 4 * FIELD) * _e8m0(_byte(at, inside))
    elif FORMAT == "fp4":
        values = _fp4(_byte(at + sub * 16 + lane, inside) >> 4 * FIELD) * _scale(apart + row * apart_cols + sub, inside)
    elif FORMAT == "fp8_e4m3":
        column = sub * 32 + lane
        there = inside & (column < cols)
        values = _fp8(_byte(at + column, there)) * _scale(apart + row // 128 * apart_cols + sub // 4, inside)
    elif FORMAT == "q4_k":
        values = _q4_k(at + sub // 4 * 144, FIELD, sub % 4, lane, inside, 0)
    elif FORMAT == "q5_k":
        values = _q4_k(at + sub // 4 * 176, FIELD, sub % 4, lane, inside, 32)
    elif FORMAT == "q2_k":
        values = _q2_k(at + sub // 4 * 84, FIELD, sub // 2 % 2, sub % 2, lane, inside)
    elif FORMAT == "q3_k":
        values = _q3_k(at + sub // 4 * 110, FIELD, sub // 2 % 2, sub % 2, lane, inside)
    elif FORMAT == "q6_k":
        values = _q6_k(at + sub // 4 * 210, FIELD, sub // 2 % 2, sub % 2, lane, inside)
    elif FORMAT == "iq2_xxs":
        values = _iq2_xxs(at + sub // 32 * 66, apart, sub // 4 % 8, sub % 4, lane, inside)
    else:
        values = _float(FORMAT, data, row, row_bytes, sub * 32 + lane, inside & (sub * 32 + lane < cols))
    return values


@triton.jit
def _float(FORMAT: tl.constexpr, data: Pointer, row: Block, row_bytes: int, column: Block, there: Block) -> Block:
    if FORMAT == "f32":
        values = tl.load(data.to(tl.pointer_type(tl.float32)) + row * (row_bytes // 4) + column, there, 0.0)
    elif FORMAT == "f16":
        values = tl.load(data.to(tl.pointer_type(tl.float16)) + row * (row_bytes // 2) + column, there, 0.0).to(tl.float32)
    else:  # bf16: the upper half of a float32
        tl.static_assert(FORMAT == "bf16")
        bits = tl.load(data.to(tl.pointer_type(tl.int16)) + row * (row_bytes // 2) + column, there, 0).to(tl.int32)
        values = (bits << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _q4_k(at: Pointer, FIELD: tl.constexpr, pair: Block, lane: Block, inside: Block, FIFTH: tl.constexpr) -> Block:
    """Q4_K and, with FIFTH bytes of fifth bits, Q5_K. pair: which two of the eight sub-blocks; FIELD: which one of them."""
    part = 2 * pair + FIELD
    first, second = _byte(at + 4 + part % 4, inside), _byte(at + 8 + part % 4, inside)
    third = _byte(at + 12 + part % 4, inside)
    scale = tl.where(part < 4, first & 63, (third & 15) | (first >> 6 << 4))
    minimum = tl.where(part < 4, second & 63, (third >> 4) | (second >> 6 << 4))
    level = _byte(at + 16 + FIFTH + pair * 32 + lane, inside) >> 4 * FIELD & 15
    if FIFTH:
        level |= (_byte(at + 16 + lane, inside) >> part & 1) << 4
    return _half(at, inside) * scale.to(tl.float32) * level.to(tl.float32) - _half(at + 2, inside) * minimum.to(tl.float32)


@triton.jit
def _q2_k(at: Pointer, FIELD: tl.constexpr, half: Block, quarter: Block, lane: Block, inside: Block) -> Block:
    """A half is 128 columns and 32 bytes of levels, a quarter 16 of these bytes."""
    scales = _byte(at + half * 8 + 2 * FIELD + quarter, inside)
    level = _byte(at + 16 + half * 32 + quarter * 16 + lane, inside) >> 2 * FIELD & 3
    scale = _half(at + 80, inside) * (scales & 15).to(tl.float32)
    return scale * level.to(tl.float32) - _half(at + 82, inside) * (scales >> 4).to(tl.float32)


@triton.jit
def _q3_k(at: Pointer, FIELD: tl.constexpr, half: Block, quarter: Block, lane: Block, inside: Block) -> Block:
    part = half * 8 + 2 * FIELD + quarter
    low = _byte(at + 96 + part % 8, inside) >> part // 8 * 4 & 15
    high = _byte(at + 104 + part % 4, inside) >> part // 4 * 2 & 3
    place = quarter * 16 + lane
    level = _byte(at + 32 + half * 32 + place, inside) >> 2 * FIELD & 3
    level |= (_byte(at + place, inside) >> half * 4 + FIELD & 1) << 2
    scale = _half(at + 108, inside) * ((low | high << 4) - 32).to(tl.float32)
    return scale * (level - 4).to(tl.float32)


@triton.jit
def _q6_k(at: Pointer, FIELD: tl.constexpr, half: Block, quarter: Block, lane: Block, inside: Block) -> Block:
    place = quarter * 16 + lane
    low = _byte(at + half * 64 + FIELD % 2 * 32 + place, inside) >> FIELD // 2 * 4 & 15
    high = _byte(at + 128 + half * 32 + place, inside) >> 2 * FIELD & 3
    scale = tl.load((at + 192 + half * 8 + 2 * FIELD + quarter).to(tl.pointer_type(tl.int8)), inside, 0).to(tl.float32)
    return _half(at + 208, inside) * scale * ((low | high << 4) - 32).to(tl.float32)


@triton.jit
def _iq2_xxs(at: Pointer, grid: Pointer, part: Block, group: Block, lane: Block, inside: Block) -> Block:
    """part: which 32 of the 256 columns; group: which eight of these."""
    words = (at + 2 + part * 8).to(tl.pointer_type(tl.int16))
    word = (tl.load(words + 2, inside, 0).to(tl.int32) & 0xFFFF) | (tl.load(words + 3, inside, 0).to(tl.int32) << 16)
    levels = tl.load(grid + _byte(at + 2 + part * 8 + group, inside), inside, 0) >> 2 * lane & 3
    signs = word >> 7 * group & 127
    odd = signs ^ signs >> 4
    odd = odd ^ odd >> 2
    minus = (signs | ((odd ^ odd >> 1) & 1) << 7) >> lane & 1
    size = (8 + 17 * levels + levels // 2).to(tl.float32)  # 8, 25 or 43
    step = _half(at, inside) * ((word >> 28 & 15).to(tl.float32) + 0.5) * 0.25
    return step * tl.where(minus == 1, -size, size)


@triton.jit
def _byte(at: Pointer, inside: Block) -> Block:
    return tl.load(at, inside, 0).to(tl.int32)


@triton.jit
def _half(at: Pointer, inside: Block) -> Block:
    return tl.load(at.to(tl.pointer_type(tl.float16)), inside, 0.0).to(tl.float32)


@triton.jit
def _scale(at: Pointer, inside: Block) -> Block:
    """Scales that lie apart: E8M0 or float32."""
    if at.dtype.element_ty == tl.float32:
        scale = tl.load(at, inside, 0.0)
    else:
        scale = _e8m0(_byte(at, inside))
    return scale


@triton.jit
def _e8m0(byte: Block) -> Block:
    """2^(byte - 127): the exponent of a float32, but for 0, which would be none, and 255, which is no number."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _fp4(code: Block) -> Block:
    """E2M1 in the low four bits: the upper bits of a float16 whose exponent is 14 too small, subnormals included."""
    bits = (code & 7) << 9 | (code & 8) << 12
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _fp8(code: Block) -> Block:
    """E4M3 in eight bits: a float16 whose exponent is 8 too small. Cards below SM89 do not know the type."""
    bits = (code & 127) << 7 | (code & 128) << 8
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 127) == 127, float("nan"), value)


@triton.jit
def met(FORMAT: tl.constexpr, FIELD: tl.constexpr, x: Pointer, there: Block, first: int, cols: int, K: tl.constexpr,
        LANES: tl.constexpr) -> Block:
    """float32 [m, K]: of the activations x (pointers to rows, [m, 1]) what meets a field of K / LANES subs from `first` on."""
    k = tl.arange(0, K)[None, :]
    column = columns(FORMAT, FIELD, first + k // LANES, k % LANES)
    return tl.load(x + column, there & (column < cols), 0.0)


@triton.jit
def multiplied(x: Block, weight: Block, total: Block, EXACT: tl.constexpr, DOT: tl.constexpr) -> Block:
    """total [m, n] + x [m, k] times the transpose of a tile [n, subs, lanes], by tensor cores that take bf16 and sum float32.
    With EXACT nothing is rounded and no tensor core is used."""
    turned = tl.trans(tl.reshape(weight, (weight.shape[0], weight.shape[1] * weight.shape[2])))
    if EXACT:
        total = tl.dot(x, turned, total, input_precision="ieee")
    else:
        total = tl.dot(x.to(DOT), turned.to(DOT), total)
    return total
