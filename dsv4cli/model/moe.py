"""The feed-forward half of a layer: a few routed experts and one that everybody visits."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dsv4_kernels.moe import ask_for
from dsv4_kernels.residual import Joined, Residual, experts_into_streams
from dsv4_kernels.router import Router
from dsv4_quant.config import ModelConfig
from dsv4cli.model.experts import Tiers
from dsv4cli.model.step import Step
from dsv4cli.model.weights import MoeWeights


class Moe:
    """Mixture of experts. The first layers route by token id, the others by a learned score."""

    def __init__(self, weights: MoeWeights, config: ModelConfig, tiers: Tiers | None = None) -> None:
        """tiers: where not all routed experts lie where the layer is computed."""
        self.weights = weights
        self.tiers = tiers
        self.limit = config.swiglu_limit
        self.router = Router(weights.gate, weights.bias, weights.table, config.num_experts_per_tok, config.routed_scaling_factor)

    def ask_for(self, token: int) -> None:
        """Has the system read a token's experts from the disk, where the token's id tells which these are."""
        if self.weights.table is not None:
            held: Collection[int] = self.tiers.slots if self.tiers else ()
            ask_for(self.weights.experts, [number for number in self.weights.table[token].tolist() if number not in held])

    def __call__(self, x: Tensor, step: Step, residual: Residual) -> Joined:
        """x [t, hidden], normed; what comes out joins the streams."""
        w = self.weights
        if self.tiers is None:
            return experts_into_streams(x, step.ids, self.router, w.shared, w.experts, self.limit, residual)
        return self.tiers(x, step, self.router, w.shared, self.limit, residual)
