"""What all layers of one forward pass share: the tokens, where they stand, and how far each position turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.norm_rope import Yarn, frequencies, turns
from dsv4_quant.config import ModelConfig


@dataclass(frozen=True)
class Rope:
    """Frequencies float32 [pairs]: `window` for layers without compression, `compress` for everything in the others."""

    window: Tensor
    compress: Tensor

    @classmethod
    def of(cls, config: ModelConfig) -> Rope:
        scaling, dims = config.rope_scaling, config.qk_rope_head_dim
        yarn = Yarn(scaling.factor, scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow)
        return cls(frequencies(dims, config.rope_theta), frequencies(dims, config.compress_rope_theta, yarn))


@dataclass(frozen=True)
class Step:
    """Tokens ids int64 [t] at positions start .. start + t; turns complex64 [t, pairs] for both kinds of layer."""

    ids: Tensor
    start: int
    positions: Tensor
    window_turns: Tensor
    compress_turns: Tensor

    @classmethod
    def at(cls, ids: Tensor, start: int, rope: Rope) -> Step:
        positions = torch.arange(start, start + len(ids))
        return cls(ids, start, positions, turns(positions, rope.window), turns(positions, rope.compress))
