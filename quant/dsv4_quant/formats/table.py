"""Every format by name: ours, and for the rest of GGUF's types those that the `gguf` package decodes."""

from __future__ import annotations

from dsv4_quant.formats import (
    fp4,
    fp8_e4m3,
    ggml,
    iq1_m,
    iq2_xs,
    iq2_xxs,
    iq3_xxs,
    iq4_xs,
    mxfp4,
    plain,
    q2_k,
    q3_k,
    q4_k,
    q5_k,
    q6_k,
    q8_0,
)
from dsv4_quant.formats.base import Format

_OWN = (
    plain.F32, plain.F16, plain.BF16, plain.F64, plain.I8, plain.I16, plain.I32, plain.I64,
    fp8_e4m3.FORMAT, fp4.FORMAT, mxfp4.FORMAT, q8_0.FORMAT,
    q6_k.FORMAT, q5_k.FORMAT, q4_k.FORMAT, q3_k.FORMAT, q2_k.FORMAT, iq4_xs.FORMAT,
    iq3_xxs.FORMAT, iq2_xs.FORMAT, iq2_xxs.FORMAT, iq1_m.FORMAT,
)  # fmt: skip
FORMATS: dict[str, Format] = ggml.FORMATS | {fmt.name: fmt for fmt in _OWN}
