"""Dequantise, then multiply: the truth that every faster matrix product is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_kernels.linear import Norm
from dsv4_kernels.norm_rope.ref import rms_norm
from dsv4_quant.formats import Packed


def linear(x: Tensor, weight: Packed | Tensor) -> Tensor:
    return functional.linear(x, _expanded(weight, x))


def linears(x: Tensor, weights: Sequence[Packed | Tensor], norm: Norm | None = None) -> list[Tensor]:
    x = x if norm is None else rms_norm(x, *norm)
    return [linear(x, weight) for weight in weights]


def grouped_linear(x: Tensor, weight: Packed | Tensor) -> Tensor:
    matrices = _expanded(weight, x).unflatten(0, (x.shape[1], -1))  # [groups, out, in]
    return torch.einsum("tgi,goi->tgo", x, matrices)


def embed(ids: Tensor, table: Packed | Tensor, times: int | None = None) -> Tensor:
    return repeated(table.rows(ids) if isinstance(table, Packed) else table[ids], times)


def repeated(rows: Tensor, times: int | None) -> Tensor:
    """rows [t, d] -> [t, times, d], or as they are."""
    return rows if times is None else rows.unsqueeze(1).repeat(1, times, 1)


def _expanded(weight: Packed | Tensor, x: Tensor) -> Tensor:
    matrix = weight.float() if isinstance(weight, Packed) else weight
    return matrix.to(x.dtype)
