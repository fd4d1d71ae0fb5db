"""Rounding and the Hadamard turn in Triton: arithmetic on float32 bits, so no FP8 or FP4 hardware is asked for, and the bits
are those of `ref`.

A program owns some rows of blocks. What is rounded for the indexer is left as bfloat16, which holds it. Tensors other than
float32 go the way of `ref`, and so do the scales themselves, which only tests ask for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16, complex64, float32

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.gpu import Block, Pointer, dense, padded, warps
from dsv4_kernels.norm_rope.gpu import real
from dsv4_kernels.rounding import FP4, FP8, INDEX_BLOCK, KV_BLOCK, ref

TILE = 4096  # values of a program
FP8_LARGEST, FP8_LEAST = tl.constexpr(FP8.largest), tl.constexpr(FP8.least)
FP4_LARGEST, FP4_LEAST = tl.constexpr(FP4.largest), tl.constexpr(FP4.least)
EXPONENT = tl.constexpr(ref.EXPONENT)
MANTISSA = tl.constexpr(ref.MANTISSA)
KV = tl.constexpr(KV_BLOCK)
INDEX = tl.constexpr(INDEX_BLOCK)
INVERSE = tl.constexpr(254 << 23)  # less a power of two's bits: the bits of its inverse
WHOLE = tl.constexpr(1.5 * 2.0**23)  # added and taken away again, it rounds to whole numbers, ties to even

power_of_two_scale = ref.power_of_two_scale
round_kv = ref.round_kv  # on cards keys are rounded where they are kept (cache/gpu.py)


def round_fp8(x: Tensor, block: int) -> Tensor:
    return _rounded(x, block, True) if x.dtype == float32 else ref.round_fp8(x, block)


def round_fp4(x: Tensor, block: int) -> Tensor:
    return _rounded(x, block, False) if x.dtype == float32 else ref.round_fp4(x, block)


def hadamard(x: Tensor) -> Tensor:
    return _turned(x, False) if x.dtype == float32 else ref.hadamard(x)


def round_index(x: Tensor, turns: Tensor | None = None) -> Tensor:
    if x.dtype != float32 or (turns is not None and turns.dtype != complex64):
        return ref.round_index(x, turns)
    return _turned(x, True, turns)


def _rounded(x: Tensor, block: int, fp8: bool) -> Tensor:
    x = dense(x)
    out, blocks, width = alloc.empty_like(x), x.numel() // block, padded(block)
    rows = max(1, TILE // width)
    if blocks:
        _round_blocks[(triton.cdiv(blocks, rows),)](x, out, blocks, block, FP8=fp8, ROWS=rows, WIDTH=width)
    return out


def _turned(x: Tensor, rounded: bool, turns: Tensor | None = None) -> Tensor:
    x = dense(x)
    out, width = alloc.empty(tuple(x.shape), bfloat16, x.device) if rounded else alloc.empty_like(x), x.shape[-1]
    count = x.numel() // width
    rows = min(padded(count), max(1, TILE // width))
    if count:
        angles, pairs = (x, 0) if turns is None else (real(turns), turns.shape[1])
        _turn[(triton.cdiv(count, rows),)](x, angles, out, count, count // x.shape[0], pairs, ROTATE=turns is not None,
                                           ROUND=rounded, ROWS=rows, WIDTH=width, BITS=width.bit_length() - 1,
                                           num_warps=warps(rows * width))
    return out


@triton.jit
def scaled(x: Block, LARGEST: tl.constexpr, LEAST: tl.constexpr, SMALLEST: tl.constexpr,
           BITS: tl.constexpr) -> tuple[Block, Block]:
    """x [rows, block] -> the magnitudes that its codes stand for, and the bits of each row's power-of-two scale [rows, 1]; a row
    with no number in it has those of infinity.

    SMALLEST: below it codes no longer get closer; BITS: of a code's mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    most = tl.max(magnitude, 1)[:, None]  # as whole numbers, NaN is greater than everything
    ratio = tl.maximum(most.to(tl.float32, bitcast=True), LEAST) * (1 / LARGEST)
    scale = (ratio.to(tl.int32, bitcast=True) + MANTISSA) & EXPONENT
    value = magnitude.to(tl.float32, bitcast=True) * (-scale + INVERSE).to(tl.float32, bitcast=True)
    value = tl.minimum(value, LARGEST)
    step = (tl.maximum(value, SMALLEST).to(tl.int32, bitcast=True) & EXPONENT) - (BITS << 23)
    steps = (value * (-step + INVERSE).to(tl.float32, bitcast=True) + WHOLE) - WHOLE
    return steps * step.to(tl.float32, bitcast=True), tl.where(most >= EXPONENT, EXPONENT, scale)


@triton.jit
def rounded(x: Block, LARGEST: tl.constexpr, LEAST: tl.constexpr, SMALLEST: tl.constexpr, BITS: tl.constexpr) -> Block:
    """x [rows, block]: each row rounded to codes with one power-of-two scale; a row with no number in it becomes NaN."""
    value, scale = scaled(x, LARGEST, LEAST, SMALLEST, BITS)
    value *= scale.to(tl.float32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    signed = (value.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(scale >= EXPONENT, float("nan"), signed)


@triton.jit
def rounded_fp8(x: Block) -> Block:
    """x [rows, block] float32 -> E4M3 codes times each row's scale."""
    return rounded(x, FP8_LARGEST, FP8_LEAST, 0.015625, 3)


@triton.jit
def codes_fp8(x: Block) -> tuple[Block, Block]:
    """x [rows, block] float32 -> its E4M3 codes and the E8M0 byte of each row [rows, 1], both int32."""
    value, scale = scaled(x, FP8_LARGEST, FP8_LEAST, 0.015625, 3)
    bits = value.to(tl.int32, bitcast=True)
    code = tl.where(value >= 0.015625, (bits >> 20) - (120 << 3), (value * 512).to(tl.int32))
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 128), scale >> 23


@triton.jit
def codes_fp4(x: Block) -> tuple[Block, Block]:
    """x [rows, block] float32 -> its E2M1 codes and the E8M0 byte of each row [rows, 1], both int32."""
    value, scale = scaled(x, FP4_LARGEST, FP4_LEAST, 1.0, 1)
    bits = value.to(tl.int32, bitcast=True)
    code = tl.where(value >= 1, (bits >> 22) - (126 << 1), (value * 2).to(tl.int32))
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8), scale >> 23


@triton.jit
def of_fp8(code: Block, scale: Block) -> Block:
    """E4M3 codes under E8M0 bytes, int32 of one shape -> float32, which bf16 holds too; NaN under the byte 255."""
    size = code & 127
    bits = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return _signed(tl.where(size >= 8, bits, size.to(tl.float32) * 0.001953125), code >> 7, scale)


@triton.jit
def of_fp4(code: Block, scale: Block) -> Block:
    """E2M1 codes under E8M0 bytes, int32 of one shape -> float32, which bf16 holds too; NaN under the byte 255."""
    size = code & 7
    bits = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    return _signed(tl.where(size >= 2, bits, size.to(tl.float32) * 0.5), code >> 3, scale)


@triton.jit
def _signed(size: Block, negative: Block, scale: Block) -> Block:
    value = size * (scale << 23).to(tl.float32, bitcast=True)
    signed = (value.to(tl.int32, bitcast=True) | (negative << 31)).to(tl.float32, bitcast=True)
    return tl.where(scale == 255, float("nan"), signed)


@triton.jit
def rounded_fp4(x: Block) -> Block:
    """x [rows, block] float32 -> E2M1 codes times each row's scale."""
    return rounded(x, FP4_LARGEST, FP4_LEAST, 1.0, 1)


@triton.jit
def turned(x: Block, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> Block:
    """x [ROWS, WIDTH = 2^BITS] times the orthonormal Sylvester-Hadamard matrix.

    Each round takes sums and differences of neighbours and lays the sums before the differences, so that after as many rounds
    as an index has bits everything is back in its order.
    """
    for _ in tl.static_range(BITS):
        left, right = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), (ROWS, WIDTH))
    return x * (WIDTH**-0.5)


@triton.jit
def _round_blocks(x: Pointer, out: Pointer, blocks: int, block: int, FP8: tl.constexpr, ROWS: tl.constexpr,
                  WIDTH: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    inside = (row < blocks) & (place < block)
    values = tl.load(x + row * block + place, inside, 0.0)
    if FP8:
        values = rounded_fp8(values)
    else:
        values = rounded_fp4(values)
    tl.store(out + row * block + place, values, inside)


@triton.jit
def _turn(x: Pointer, angles: Pointer, out: Pointer, count: int, heads: int, pairs: int, ROTATE: tl.constexpr,
          ROUND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    turn_rows(x, angles, out, row, count, heads, pairs, ROTATE, True, ROUND, ROWS, WIDTH, BITS)


@triton.jit
def turn_rows(x: Pointer, angles: Pointer, out: Pointer, row: Block, count: int, heads: int, pairs: int, ROTATE: tl.constexpr,
              HADAMARD: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr) -> None:
    """Rows [ROWS, 1] of x [count, WIDTH], `heads` of them a token's: turned to the token's place, by Hadamard, rounded to FP4
    (then `out` is bfloat16)."""
    place = tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + row * WIDTH + place, row < count, 0.0)
    if ROTATE:
        still = WIDTH - 2 * pairs
        turning = (row < count) & (place >= still)
        other = tl.load(x + row * WIDTH + (place ^ 1), turning, 0.0)
        angle = angles + (row // heads * pairs + (place - still) // 2) * 2
        cosine, sine = tl.load(angle, turning, 1.0), tl.load(angle + 1, turning, 0.0)
        values = tl.where(turning, values * cosine + other * tl.where((place & 1) == 1, sine, -sine), values)
    if HADAMARD:
        values = turned(values, ROWS, WIDTH, BITS)
    if ROUND:
        values = tl.reshape(rounded_fp4(tl.reshape(values, (ROWS * WIDTH // INDEX, INDEX))), (ROWS, WIDTH))
        values = (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)  # the rest is zeros
    tl.store(out + row * WIDTH + place, values, row < count)


AHEAD = (
    Case(_round_blocks, "*fp32 *fp32 i32 i32:16", {"FP8": True, "ROWS": 64, "WIDTH": 64}),
    Case(_turn, "*fp32 *fp32 *bf16 i32:16 i32:16 i32:16", {"ROTATE": True, "ROUND": True,
         "ROWS": 32, "WIDTH": 128, "BITS": 7}, warps=8),
)
