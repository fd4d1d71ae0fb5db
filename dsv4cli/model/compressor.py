"""Full groups of tokens become entries: pooled, normed, rotated to their first token's place, rounded, stored."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.cache import Rounding, keep_keys
from dsv4_kernels.compressor import compress
from dsv4cli.model.state import Compressed
from dsv4cli.model.step import Step
from dsv4cli.model.weights import CompressorWeights


class Compressor:
    """Of one layer, for K=V (width head_dim) or for index keys (width index_head_dim)."""

    def __init__(self, weights: CompressorWeights, ratio: int, eps: float, rounding: Rounding) -> None:
        self.weights = weights
        self.ratio = ratio
        self.eps = eps
        self.rounding = rounding

    def __call__(self, kv: Tensor, scores: Tensor, step: Step, memory: Compressed) -> None:
        """Takes the tokens' normed inputs as wkv and wgate project them; stores the entries that they complete."""
        pooled = compress(kv, scores, self.weights.ape, memory.pending, step.start, step.live)
        if len(pooled):
            turns = step.groups(self.ratio).turns
            keep_keys(pooled, self.weights.norm, self.eps, turns, self.rounding, *memory.store.place(step))
