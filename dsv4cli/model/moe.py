"""The feed-forward half of a layer: a few routed experts and one that everybody visits."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.moe import routed_experts, shared_expert
from dsv4_kernels.router import route_by_hash, route_learned
from dsv4_quant.config import ModelConfig
from dsv4cli.model.weights import MoeWeights


class Moe:
    """Mixture of experts. The first layers route by token id, the others by a learned score."""

    def __init__(self, weights: MoeWeights, config: ModelConfig) -> None:
        self.weights = weights
        self.limit = config.swiglu_limit
        self.k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [t, hidden], normed; ids int64 [t] -> [t, hidden]."""
        shares, chosen = self._route(x, ids)
        out = shared_expert(x, self.weights.shared, self.limit)
        return routed_experts(x, shares, chosen, self.weights.experts, self.limit, onto=out)

    def _route(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weights
        if w.table is not None:
            return route_by_hash(x, w.gate, w.table, ids, self.scale)
        assert w.bias is not None, "a layer is routed by a table or by a bias"
        return route_learned(x, w.gate, w.bias, self.k, self.scale)
