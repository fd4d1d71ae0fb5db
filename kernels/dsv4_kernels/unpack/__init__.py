"""Packed matrices as Triton kernels take them: bytes, what lies apart from them, and how a format is walked through.

A kernel walks along a row in *subs*: runs of columns that share their scales. What a byte holds (two nibbles, four pairs of bits)
are its *fields*: a byte is loaded once, and its fields meet the columns they belong to one after another, so nothing is ever
shuffled between threads. A sub has `lanes` columns in each of its `fields`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4_quant.formats import Packed, grids


class Layout(NamedTuple):
    fields: int
    lanes: int

    @property
    def columns(self) -> int:
        """Of a row, per sub."""
        return self.fields * self.lanes


LAYOUTS = {
    "f32": Layout(1, 32), "f16": Layout(1, 32), "bf16": Layout(1, 32), "fp8_e4m3": Layout(1, 32), "q8_0": Layout(1, 32),
    "fp4": Layout(2, 16), "mxfp4": Layout(2, 16), "q4_k": Layout(2, 32), "q5_k": Layout(2, 32),
    "q2_k": Layout(4, 16), "q3_k": Layout(4, 16), "q6_k": Layout(4, 16), "iq2_xxs": Layout(1, 8),
}  # fmt: skip
FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_SLOT = "_card_matrix"  # where a Packed keeps its Matrix: what it describes is immutable, and it dies with it


class Matrix(NamedTuple):
    """A matrix in a card's memory. With `exact` (and for float32) nobody rounds what it is multiplied with."""

    format: str
    data: Tensor  # uint8, a row of `row_bytes` for each of `rows`
    apart: Tensor  # scales [.., apart_cols] (uint8 E8M0 or float32) or an IQ format's grid; `data` where there is nothing
    rows: int
    cols: int
    row_bytes: int
    apart_cols: int
    exact: bool

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.format]

    @property
    def subs(self) -> int:
        return -(-self.cols // self.layout.columns)


def matrix(weight: Packed | Tensor) -> Matrix | None:
    """The weight for a kernel; None for a format without a kernel or a memory order that none expects."""
    if isinstance(weight, Tensor):
        if weight.dtype not in FLOATS or weight.dim() != 2 or weight.stride(1) != 1:
            return None
        return _matrix(FLOATS[weight.dtype], weight, None, weight.shape, False)
    known: Any = vars(weight)
    if _SLOT not in known:
        known[_SLOT] = _of_packed(weight)
    found: Matrix | None = known[_SLOT]
    return found


def _of_packed(weight: Packed) -> Matrix | None:
    data, scale = weight.data, weight.scale
    if weight.format not in LAYOUTS or data.dim() != 2 or data.stride(1) != 1:
        return None
    if scale is not None and (not scale.is_contiguous() or scale.element_size() not in (1, 4)):
        return None
    return _matrix(weight.format, data, scale, weight.shape, weight.exact)


def _matrix(name: str, data: Tensor, scale: Tensor | None, shape: tuple[int, ...], exact: bool) -> Matrix:
    raw = data.detach().view(torch.uint8)
    apart, apart_cols = raw, 0
    if scale is not None:
        apart, apart_cols = scale if scale.dtype == torch.float32 else scale.view(torch.uint8), scale.shape[1]
    elif name == "iq2_xxs":
        apart = _iq2_xxs(data.device)
    rows, cols = shape
    return Matrix(name, raw, apart, rows, cols, raw.stride(0), apart_cols, exact or name == "f32")


@cache
def _iq2_xxs(device: torch.device) -> Tensor:
    """int32 [256]: for each point the levels (0, 1, 2 for magnitudes 8, 25, 43) of its eight elements, two bits each."""
    magnitudes = grids.iq2_xxs().int()
    levels = (magnitudes > 8).int() + (magnitudes > 25).int()
    return (levels << torch.arange(0, 16, 2, dtype=torch.int32)).sum(1, dtype=torch.int32).to(device)
