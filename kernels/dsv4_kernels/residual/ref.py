"""The end of a sublayer in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4_kernels.hyper.ref import spread_streams
from dsv4_kernels.linear import Weight
from dsv4_kernels.linear.ref import linear
from dsv4_kernels.moe import Expert
from dsv4_kernels.moe.ref import routed_experts, shared_expert
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.router import Router, ref, routed


def project_into_streams(x: Tensor, weight: Weight, residual: Residual) -> Joined:
    return Joined(spread_streams(linear(x, weight), *residual[:3]))


def experts_into_streams(x: Tensor, ids: Tensor, router: Router, shared: Expert, experts: Sequence[Expert], limit: float,
                         residual: Residual, told: Tensor | None = None) -> Joined:
    shares, chosen = routed(ref, x, router, ids)
    if told is not None:
        told.copy_(chosen)
    out = routed_experts(x, shares, chosen, experts, limit, shared_expert(x, shared, limit))
    return Joined(spread_streams(out, *residual[:3]))
