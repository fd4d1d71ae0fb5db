"""Numbers that torch knows as they are: F32, F16, BF16 and the integers of tables."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format, typed


def _rounded(kind: torch.dtype, rows: Tensor, importance: Tensor | None) -> Tensor:
    """The rows as numbers of this type, each the nearest; what is finite stays so."""
    largest = torch.finfo(kind).max
    return rows.clamp(-largest, largest).to(kind)


F32 = Format("f32", 1, 4, typed, encode=partial(_rounded, torch.float32))
F16 = Format("f16", 1, 2, typed, encode=partial(_rounded, torch.float16))
BF16 = Format("bf16", 1, 2, typed, encode=partial(_rounded, torch.bfloat16))
F64 = Format("f64", 1, 8, typed)
I8 = Format("i8", 1, 1, typed)
I16 = Format("i16", 1, 2, typed)
I32 = Format("i32", 1, 4, typed)
I64 = Format("i64", 1, 8, typed)
