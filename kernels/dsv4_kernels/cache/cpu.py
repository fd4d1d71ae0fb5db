"""Keeping float32 rows in C++, as float32 or bfloat16. Other types, and places that are not contiguous, go the way of `ref`."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, bfloat16, complex64, float32

from dsv4_kernels.cache import Rounding, ref
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import dense, settle
from dsv4_kernels.rounding import INDEX_BLOCK, KV_BLOCK

signature("dsv4_keep", P, I, I, P)
signature("dsv4_keep_keys", P, P, F, P, I, I, I, I, I, I, P, P)

_NUMBERS = {name: number for number, name in enumerate(get_args(Rounding))}  # of enum Rounding in steps.h
_BLOCKS = {"none": 0, "kv": KV_BLOCK, "index": INDEX_BLOCK}


def keep(rows: Tensor, to: Tensor) -> None:
    if rows.dtype != float32 or to.dtype not in (float32, bfloat16) or not to.is_contiguous():
        settle()
        ref.keep(rows, to)
        return
    load().dsv4_keep(dense(rows).data_ptr(), rows.numel(), to.dtype == bfloat16, to.data_ptr())


def keep_keys(x: Tensor, norm: Tensor, eps: float, turns: Tensor, rounding: Rounding, to: Tensor,
              row: Tensor | None = None) -> None:
    if not x.dtype == norm.dtype == float32 or turns.dtype != complex64 or turns.is_conj() or (
            to.dtype not in (float32, bfloat16) or not to.is_contiguous()):
        settle()
        ref.keep_keys(x, norm, eps, turns, rounding, to, row)
        return
    rows, d = x.shape
    load().dsv4_keep_keys(dense(x).data_ptr(), dense(norm).data_ptr(), eps, dense(turns).data_ptr(), rows, d, turns.shape[1],
                          _NUMBERS[rounding], _BLOCKS[rounding], to.dtype == bfloat16, to.data_ptr(),
                          None if row is None else row.data_ptr())
