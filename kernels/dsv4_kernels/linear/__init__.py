"""Matrix products with weights as they are stored, and the embedding look-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_multiple, demand_shape
from dsv4_quant.formats import Packed

Weight: TypeAlias = Packed | Tensor  # a matrix [out, in], packed as in its file or already expanded


class Norm(NamedTuple):
    """An RMS norm in front of a product."""

    weight: Tensor  # [in]
    eps: float


def linear(x: Tensor, weight: Weight, *, backend: str | None = None) -> Tensor:
    """y = x W^T. x [..., in], weight [out, in] -> [..., out] in x's dtype.

    Activations are not quantised. Raises ValueError when the inner sizes differ.
    """
    demand_shape("weight", weight, None, x.shape[-1])
    return pick("linear", x.device.type, backend).module.linear(x, weight)


def linears(x: Tensor, weights: Sequence[Weight], norm: Norm | None = None, *, backend: str | None = None) -> list[Tensor]:
    """The products of one x [..., in] with several matrices [out, in], in their order: what `linear` makes of each.

    With norm, x is RMS-normed first. Raises ValueError when an inner size differs.
    """
    for weight in weights:
        demand_shape("weight", weight, None, x.shape[-1])
    if norm is not None:
        demand_shape("norm weight", norm.weight, x.shape[-1])
    return pick("linear", x.device.type, backend).module.linears(x, weights, norm)


def grouped_linear(x: Tensor, weight: Weight, *, backend: str | None = None) -> Tensor:
    """A matrix per group: x [t, groups, in], weight [groups * out, in] -> [t, groups, out].

    Raises ValueError when the inner sizes differ or the rows cannot be dealt evenly to the groups.
    """
    demand_shape("x", x, None, None, None)
    demand_shape("weight", weight, None, x.shape[-1])
    demand_multiple("weight rows", weight.shape[0], x.shape[1])
    return pick("linear", x.device.type, backend).module.grouped_linear(x, weight)


def embed(ids: Tensor, table: Weight, times: int | None = None, *, backend: str | None = None) -> Tensor:
    """Rows of a table: ids [t] int64, table [vocab, d] -> float32 [t, d]; with times [t, times, d], each row so many times. Only
    these rows are decoded."""
    demand_shape("ids", ids, None)
    demand_shape("table", table, None, None)
    return pick("linear", ids.device.type, backend).module.embed(ids, table, times)
