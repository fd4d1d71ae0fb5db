"""Numbers that torch knows as they are: F32, F16, BF16 and the integers of tables."""

from __future__ import annotations

from dsv4_quant.formats.base import Format, typed

F32 = Format("f32", 1, 4, typed)
F16 = Format("f16", 1, 2, typed)
BF16 = Format("bf16", 1, 2, typed)
F64 = Format("f64", 1, 8, typed)
I8 = Format("i8", 1, 1, typed)
I16 = Format("i16", 1, 2, typed)
I32 = Format("i32", 1, 4, typed)
I64 = Format("i64", 1, 8, typed)
