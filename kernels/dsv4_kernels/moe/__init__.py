"""Expert networks: clamped SwiGLU, routed and shared (spec/checkpoint.md section 3.10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape
from dsv4_kernels.linear import Weight


class Expert(NamedTuple):
    """w2 (silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)): w1 is the gate, w3 the way up, w2 the way down."""

    w1: Weight  # [width, d]
    w3: Weight  # [width, d]
    w2: Weight  # [d, width]


class Experts(list[Expert]):
    """The experts of one layer. A list that a backend may keep its own view of, so it must not change after its first use."""


def routed_experts(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert], limit: float,
                   onto: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Weighted sum of the chosen experts, added in place to `onto` if it is given; no other expert is touched.

    x [t, d], weights [t, k], chosen int64 [t, k] (indices into `experts`) -> [t, d]. The weight multiplies before w2.
    Sums run over experts in their order, in x's dtype.
    """
    demand_shape("expert weights", weights, x.shape[0], None)
    demand_shape("chosen experts", chosen, *weights.shape)
    _demand_fit(x, experts[0])
    if onto is not None:
        demand_shape("onto", onto, *x.shape)
    return pick("moe", x.device.type, backend).module.routed_experts(x, weights, chosen, experts, limit, onto)


def shared_expert(x: Tensor, expert: Expert, limit: float, *, backend: str | None = None) -> Tensor:
    """The expert that every token visits, without a weight. x [t, d] -> [t, d]."""
    _demand_fit(x, expert)
    return pick("moe", x.device.type, backend).module.shared_expert(x, expert, limit)


def ask_for(experts: Sequence[Expert], numbers: Sequence[int], *, backend: str | None = None) -> None:
    """Has the system read experts of the mapped file that will soon be needed, while others compute; see `backends.ask_ahead`."""
    pick("moe", "cpu", backend).module.ask_for(experts, numbers)


def _demand_fit(x: Tensor, expert: Expert) -> None:
    demand_shape("x", x, None, expert.w1.shape[1])
    width, d = expert.w1.shape
    demand_shape("w3", expert.w3, width, d)
    demand_shape("w2", expert.w2, d, width)
