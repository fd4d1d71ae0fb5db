"""Full groups of tokens become entries: pooled, normed, rotated to their first token's place, rounded, stored."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsv4_kernels.compressor import compress
from dsv4_kernels.linear import linear
from dsv4_kernels.norm_rope import rms_norm, rotate
from dsv4cli.model.state import Compressed
from dsv4cli.model.step import Step
from dsv4cli.model.weights import CompressorWeights


class Compressor:
    """Of one layer, for K=V (width head_dim) or for index keys (width index_head_dim)."""

    def __init__(self, weights: CompressorWeights, ratio: int, eps: float, rounded: Callable[[Tensor], Tensor]) -> None:
        self.weights = weights
        self.ratio = ratio
        self.eps = eps
        self.rounded = rounded

    def __call__(self, x: Tensor, step: Step, memory: Compressed) -> None:
        """Takes the normed inputs x [t, hidden] of the step's tokens; stores the entries that they complete."""
        w = self.weights
        pooled = compress(linear(x, w.wkv), linear(x, w.wgate), w.ape, memory.pending, step.start)
        if len(pooled):
            entries = rotate(rms_norm(pooled, w.norm, self.eps), step.groups(self.ratio).turns)
            memory.store.append(self.rounded(entries))
