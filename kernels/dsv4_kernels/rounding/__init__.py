"""What the reference's caches do to their values: FP8 and FP4 rounding, and the Hadamard turn before FP4.

After rounding, every value is a code of 8 or 4 bits times a power of two, so a packed cache holds it without loss
(spec/checkpoint.md sections 3.1 and 3.14). Scales come from the bits of float32 numbers and are exact powers of two.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_multiple, demand_shape


class Code(NamedTuple):
    """A small float type: its greatest value, and the smallest greatest magnitude of a block that counts."""

    largest: float
    least: float


FP8 = Code(448.0, 1e-4)  # E4M3
FP4 = Code(6.0, 6.0 * 2.0 ** -126)  # E2M1
KV_BLOCK, INDEX_BLOCK = 64, 32  # values under one scale


def round_fp8(x: Tensor, block: int = KV_BLOCK, *, backend: str | None = None) -> Tensor:
    """Each block of the last axis rounded to E4M3 with one power-of-two scale. x [..., n * block] -> like x.

    Ties go to the even code. Raises ValueError when the last axis is not a multiple of the block.
    """
    demand_multiple("last axis", x.shape[-1], block)
    return pick("rounding", x.device.type, backend).module.round_fp8(x, block)


def round_fp4(x: Tensor, block: int = INDEX_BLOCK, *, backend: str | None = None) -> Tensor:
    """Each block of the last axis rounded to E2M1 (0 .5 1 1.5 2 3 4 6), one power-of-two scale; ties to even codes."""
    demand_multiple("last axis", x.shape[-1], block)
    return pick("rounding", x.device.type, backend).module.round_fp4(x, block)


def scale_exponents(amax: Tensor, code: Code) -> Tensor:
    """log2 of the scale that rounding gives blocks with these greatest magnitudes: int64, like amax."""
    return pick("rounding", amax.device.type).module.power_of_two_scale(amax, code).log2().round().long()


def hadamard(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x times the orthonormal Sylvester-Hadamard matrix of its last axis, whose size must be a power of two."""
    _demand_power_of_two(x.shape[-1])
    return pick("rounding", x.device.type, backend).module.hadamard(x)


def round_kv(x: Tensor, rotated: int, *, backend: str | None = None) -> Tensor:
    """What an official cache keeps of K=V vectors: round_fp8 of all but the last `rotated` values, and those in bf16.

    x [..., n * 64 + rotated] -> like x. Raises ValueError when the part before is not a multiple of 64.
    """
    demand_multiple("part before the rotated values", x.shape[-1] - rotated, KV_BLOCK)
    return pick("rounding", x.device.type, backend).module.round_kv(x, rotated)


def round_index(x: Tensor, turns: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """What official numerics keep of index keys and queries: the Hadamard turn, then round_fp4, in x's type or in
    bfloat16, which holds every such value. With turns complex [t, pairs] the last 2 * pairs values of x [t, ..., d] are turned by
    them first (norm_rope.rotate)."""
    demand_multiple("last axis", x.shape[-1], INDEX_BLOCK)
    _demand_power_of_two(x.shape[-1])
    if turns is not None:
        demand_shape("turns", turns, x.shape[0], None)
    return pick("rounding", x.device.type, backend).module.round_index(x, turns)


def _demand_power_of_two(size: int) -> None:
    if size < 1 or size & (size - 1):
        raise ValueError(f"last axis is {size}, but must be a power of two")
