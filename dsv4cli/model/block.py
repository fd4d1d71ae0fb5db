"""One layer: attention, then experts, each between mixing the streams down and spreading its output over them."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.hyper import HyperSettings, mix_streams
from dsv4_kernels.residual import Joined, Residual
from dsv4_quant.config import ModelConfig
from dsv4cli.model.attention import Attention
from dsv4cli.model.experts import Tiers
from dsv4cli.model.moe import Moe
from dsv4cli.model.numerics import Numerics
from dsv4cli.model.state import LayerState
from dsv4cli.model.step import Step
from dsv4cli.model.weights import LayerWeights


class Block:
    """Layer number `layer` of the trunk."""

    def __init__(self, weights: LayerWeights, config: ModelConfig, layer: int, numerics: Numerics, after: Tensor,
                 tiers: Tiers | None = None) -> None:
        """after: `fn` of the mixer that reads what this layer writes. tiers: of its experts, where they lie in several places."""
        self.weights = weights
        self.after = after
        self.hyper = HyperSettings(config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters)
        self.attention = Attention(weights.attention, config, config.ratio(layer), numerics)
        self.moe = Moe(weights.moe, config, tiers)

    def __call__(self, given: Joined, step: Step, state: LayerState) -> Joined:
        """streams [t, hc_mult, hidden] -> the same, one layer later."""
        w, (streams, sums) = self.weights, given
        x, post, across = mix_streams(streams, w.hc_attn, self.hyper, w.attn_norm, sums)
        streams, sums = self.attention(x, step, state, Residual(streams, post, across, w.hc_ffn.fn))

        x, post, across = mix_streams(streams, w.hc_ffn, self.hyper, w.ffn_norm, sums)
        return self.moe(x, step, Residual(streams, post, across, self.after))
