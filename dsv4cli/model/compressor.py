"""Full groups of tokens become entries: pooled, normed, rotated to their first token's place, rounded, stored."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.cache import Rounding
from dsv4_kernels.prologue import Compression, Keeping
from dsv4cli.model.state import Compressed
from dsv4cli.model.step import Step
from dsv4cli.model.weights import CompressorWeights


class Compressor:
    """Of one layer, for K=V (width head_dim) or for index keys (width index_head_dim)."""

    def __init__(self, weights: CompressorWeights, ratio: int, rounding: Rounding) -> None:
        self.weights = weights
        self.ratio = ratio
        self.rounding = rounding

    def __call__(self, kv: Tensor, scores: Tensor, step: Step, memory: Compressed) -> Compression:
        """Of the tokens' normed inputs as wkv and wgate project them: what is to be done with them, and where the entries that
        they complete go, which count as filled from now on."""
        turns = step.groups(self.ratio).turns
        entries = Keeping(self.weights.norm, turns, self.rounding, *memory.store.place(step)) if len(turns) else None
        return Compression(kv, scores, self.weights.ape, memory.pending, entries)
