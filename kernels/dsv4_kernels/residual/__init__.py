"""The end of a sublayer: its last product, and how that joins the residual streams (spec/checkpoint.md sections 3.6 and 3.10).

One door for both, since on a card they are one launch for few tokens, which also leaves behind what the next mixture sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape
from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import Expert
from dsv4_kernels.router import Router


class Residual(NamedTuple):
    """Where a sublayer's output goes."""

    streams: Tensor  # [t, s, d]: those that the sublayer's input was mixed from
    post: Tensor     # [t, s]: share of the output that each stream takes
    across: Tensor   # [t, s, s]: how the streams are mixed meanwhile, from the first index to the second
    fn: Tensor       # [m, s * d] of the mixer that reads the new streams next


class Joined(NamedTuple):
    """New streams [t, s, d]; and sums [t, m + 1, parts] for the next mixer, or None if it has to sum itself."""

    streams: Tensor
    sums: Tensor | None = None


def project_into_streams(x: Tensor, weight: Weight, residual: Residual, *, backend: str | None = None) -> Joined:
    """spread_streams(linear(x, weight), ...). x [t, in], weight [d, in]."""
    _demand_fit(x, residual)
    demand_shape("weight", weight, residual.streams.shape[2], x.shape[-1])
    return pick("residual", x.device.type, backend).module.project_into_streams(x, weight, residual)


def experts_into_streams(x: Tensor, ids: Tensor, router: Router, shared: Expert, experts: Sequence[Expert], limit: float,
                         residual: Residual, told: Tensor | None = None, *, backend: str | None = None) -> Joined:
    """spread_streams(shared_expert(x) + routed_experts(x), ...), with the experts that `route` chooses, and writes to `told`.

    x [t, d], ids int64 [t], told int64 [t, k] or None. Sums run over the shared expert first, then over experts in
    any fixed order.
    """
    _demand_fit(x, residual)
    demand_shape("x", x, None, residual.streams.shape[2])
    demand_shape("ids", ids, x.shape[0])
    demand_shape("router gate", router.gate, len(experts), x.shape[1])
    if told is not None:
        demand_shape("told", told, x.shape[0], router.k)
    module = pick("residual", x.device.type, backend).module
    return module.experts_into_streams(x, ids, router, shared, experts, limit, residual, told)


def _demand_fit(x: Tensor, residual: Residual) -> None:
    streams, post, across, fn = residual
    demand_shape("streams", streams, x.shape[0], None, None)
    t, s, d = streams.shape
    demand_shape("post", post, t, s)
    demand_shape("across", across, t, s, s)
    demand_shape("hyper fn", fn, None, s * d)
