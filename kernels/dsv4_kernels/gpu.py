"""What the Triton kernels of several operations share.

Kernels are compiled for whatever card is there; with TRITON_INTERPRET=1, set before Triton is imported, they run in Triton's
interpreter on CPU tensors, which is how they are tested where no card is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32

if TYPE_CHECKING:
    Pointer: TypeAlias = Any
    Block: TypeAlias = Any
    Together: TypeAlias = Any
else:
    # The compiler looks annotations up, and knows these.
    Pointer = tl.tensor  # a tensor outside of a kernel, its address within
    Block = tl.tensor  # a tile of values, held by one program
    Together = tl.tuple  # arguments that come as one

INTERPRETED = bool(triton.knobs.runtime.interpret)
# What tensor cores multiply. The interpreter would multiply the codes of bf16 values, so it gets the same values in float32.
DOT = tl.float32 if INTERPRETED else tl.bfloat16
CACHED = (float32, bfloat16)  # types of what caches hold that the kernels read


def padded(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`: tiles have no other sizes."""
    return max(least, 1 << max(0, size - 1).bit_length())


def warps(values: int) -> int:
    """How many warps share a tile of so many values: some sixteen for each thread, from one warp to eight."""
    return min(8, max(1, padded(values) // 512))


def dense(x: Tensor) -> Tensor:
    """x in row-major order, in the memory where it is if it is so already."""
    return x.contiguous()


@triton.jit
def bf16_part(x: Block) -> Block:
    """The upper 16 bits of float32 values, as float32: a bf16 number, nearer to zero."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def bf16_terms(x: Block) -> tuple[Block, Block, Block]:
    """Three bf16 numbers, as float32, whose sum is x exactly (each holds 8 of its 24 bits)."""
    first = bf16_part(x)
    rest = x - first
    second = bf16_part(rest)
    return first, second, rest - second


@triton.jit
def multiplied(x: Block, kept: Block, total: Block, WIDE: tl.constexpr, DOT: tl.constexpr) -> Block:
    """total + x [m, k] float32 times what a cache keeps [k, n], float32 if WIDE, else bf16 that meets x's three bf16 parts: then
    tensor cores do it, and the products are exact."""
    if WIDE:
        return tl.dot(x, kept, total, input_precision="ieee")
    else:
        first, second, third = bf16_terms(x)
        total = tl.dot(third.to(DOT), kept.to(DOT), total)
        total = tl.dot(second.to(DOT), kept.to(DOT), total)
        return tl.dot(first.to(DOT), kept.to(DOT), total)


@triton.jit
def to_bf16(x: Block) -> Block:
    """float32 values rounded to bf16, ties to even, as float32. By bits, for the interpreter's own conversion rounds ties up."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 32767 + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def in_order(x: Block) -> Block:
    """float32 -> int32 that compare as the numbers do: equal zeros are equal, and NaN is the greatest, as in torch."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
