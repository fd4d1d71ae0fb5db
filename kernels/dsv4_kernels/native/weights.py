"""Weights as the C++ kernels want them: a struct of pointers into the mapped file, made once per weight."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from dsv4_quant.formats import Packed

# In the order of enum Format in weight.h.
FORMATS = ("f32", "f16", "bf16", "fp8_e4m3", "q8_0", "mxfp4", "fp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq2_xxs",
           "iq3_xxs")
NUMBERS = {name: number for number, name in enumerate(FORMATS)}
SCALES_APART = {"fp8_e4m3", "fp4"}
_SLOT = "_native_weight"  # where a Packed keeps its struct: what it describes is immutable, and it dies with it


class Weight(ctypes.Structure):
    """struct Weight of weight.h."""

    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("rows", ctypes.c_int64),
                ("cols", ctypes.c_int64), ("row_bytes", ctypes.c_int64), ("scale_cols", ctypes.c_int64),
                ("format", ctypes.c_int32), ("float_scales", ctypes.c_int32), ("exact", ctypes.c_int32)]


def native(weight: Packed | Tensor) -> Weight | None:
    """The struct for a matrix, which must outlive its use; None for a format without a kernel or a memory order that
    none expects."""
    if isinstance(weight, Tensor):
        return _of_tensor(weight)
    known: Any = vars(weight)
    if _SLOT not in known:
        known[_SLOT] = _of_packed(weight)
    found: Weight | None = known[_SLOT]
    return found


def _of_tensor(weight: Tensor) -> Weight | None:
    if weight.dtype != torch.float32 or weight.dim() != 2 or weight.stride(1) != 1 or weight.device.type != "cpu":
        return None
    return Weight(weight.data_ptr(), None, *weight.shape, weight.stride(0) * 4, 0, NUMBERS["f32"], 0, 0)


def _of_packed(weight: Packed) -> Weight | None:
    data, scale = weight.data, weight.scale
    if weight.format not in NUMBERS or data.dim() != 2 or data.stride(1) != 1 or data.device.type != "cpu":
        return None
    if weight.format not in SCALES_APART:
        return _struct(weight, None, 0, False)
    if scale is None or not scale.is_contiguous() or scale.element_size() not in (1, 4):
        return None
    return _struct(weight, scale.data_ptr(), scale.shape[1], scale.dtype == torch.float32)


def _struct(weight: Packed, scales: int | None, scale_cols: int, float_scales: bool) -> Weight:
    row_bytes = weight.data.stride(0) * weight.data.element_size()
    return Weight(weight.data.data_ptr(), scales, *weight.shape, row_bytes, scale_cols, NUMBERS[weight.format],
                  float_scales, weight.exact)
