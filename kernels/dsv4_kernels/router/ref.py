"""Routers in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dsv4_kernels.linear import Weight
from dsv4_kernels.linear.ref import linear


def route_learned(x: Tensor, gate: Weight, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = _scores(x, gate)
    experts = (scores + bias).topk(k, sorted=False).indices
    return _weights(scores, experts, scale), experts


def route_by_hash(x: Tensor, gate: Weight, table: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    experts = table[ids]
    return _weights(_scores(x, gate), experts, scale), experts


def _scores(x: Tensor, gate: Weight) -> Tensor:
    return functional.softplus(linear(x, gate)).sqrt()


def _weights(scores: Tensor, experts: Tensor, scale: float) -> Tensor:
    chosen = scores.gather(1, experts)
    return chosen / chosen.sum(-1, keepdim=True) * scale
