"""Keeping float32 rows in C++, as float32 or bfloat16. Other types, and places that are not contiguous, go the way of `ref`."""

from __future__ import annotations

from torch import Tensor, bfloat16, float32

from dsv4_kernels.cache import ref
from dsv4_kernels.native.library import I, P, load, signature
from dsv4_kernels.native.queue import dense, settle

signature("dsv4_keep", P, I, I, P)


def keep(rows: Tensor, to: Tensor) -> None:
    if rows.dtype != float32 or to.dtype not in (float32, bfloat16) or not to.is_contiguous():
        settle()
        ref.keep(rows, to)
        return
    load().dsv4_keep(dense(rows).data_ptr(), rows.numel(), to.dtype == bfloat16, to.data_ptr())
