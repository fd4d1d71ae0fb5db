"""llama.cpp's own quantisers as an oracle, through the library inside the `xllamacpp` wheel."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantize(name: str, rows: Tensor, importance: Tensor) -> Tensor:
    """uint8 [n, row bytes] of float32 rows [n, columns] with importance float32 [columns]."""
    kind = GGMLQuantizationType[name.upper()]
    block, size = GGML_QUANT_SIZES[kind]
    n, columns = rows.shape
    rows, importance = rows.float().contiguous(), importance.float().contiguous()
    out = torch.empty(n, columns // block * size, dtype=torch.uint8)
    arguments = kind.value, rows.data_ptr(), out.data_ptr(), 0, n, columns, importance.data_ptr()
    assert _library().ggml_quantize_chunk(*arguments) == out.nbytes
    return out
