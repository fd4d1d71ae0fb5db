"""Which experts a token visits, and with what weight (spec/checkpoint.md section 3.10)."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape
from dsv4_kernels.linear import Weight


class Router(NamedTuple):
    """A layer's router: by bias, or in the first layers by table."""

    gate: Weight          # [experts, d]
    bias: Tensor | None   # [experts]
    table: Tensor | None  # int64 [vocab, k]
    k: int                # experts per token
    scale: float


def route(x: Tensor, router: Router, ids: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """`route_by_hash` where there is a table, else `route_learned`."""
    if router.table is not None:
        return route_by_hash(x, router.gate, router.table, ids, router.scale, backend=backend)
    assert router.bias is not None, "a layer is routed by a table or by a bias"
    return route_learned(x, router.gate, router.bias, router.k, router.scale, backend=backend)


def routed(module: ModuleType, x: Tensor, router: Router, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one of the backends' modules, for other operations' backends."""
    if router.table is not None:
        return module.route_by_hash(x, router.gate, router.table, ids, router.scale)
    return module.route_learned(x, router.gate, router.bias, router.k, router.scale)


def route_learned(x: Tensor, gate: Weight, bias: Tensor, k: int, scale: float, *,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Experts by score: the k greatest of sqrt(softplus(gate x)) + bias. The bias chooses and does not weigh.

    x [t, d], gate [experts, d], bias [experts] -> weights [t, k] (scores over their sum, times scale) and experts int64
    [t, k].
    """
    demand_shape("x", x, None, gate.shape[1])
    demand_shape("router bias", bias, gate.shape[0])
    if not 1 <= k <= gate.shape[0]:
        raise ValueError(f"{k} of {gate.shape[0]} experts cannot be chosen")
    return pick("router", x.device.type, backend).module.route_learned(x, gate, bias, k, scale)


def route_by_hash(x: Tensor, gate: Weight, table: Tensor, ids: Tensor, scale: float, *,
                  backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Experts by token id, weights by score all the same.

    x [t, d], gate [experts, d], table int64 [vocab, k], ids int64 [t] -> weights [t, k], experts int64 [t, k].
    """
    demand_shape("x", x, None, gate.shape[1])
    demand_shape("ids", ids, x.shape[0])
    demand_shape("expert table", table, None, None)
    return pick("router", x.device.type, backend).module.route_by_hash(x, gate, table, ids, scale)
