"""Full groups of tokens become entries: pooled, normed, rotated to their first token's place, rounded, stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_kernels.compressor import compress
from dsv4_kernels.linear import linear
from dsv4_kernels.norm_rope import rms_norm, rotate, turns
from dsv4cli.model.state import Compressed
from dsv4cli.model.weights import CompressorWeights


class Compressor:
    """Of one layer, for K=V (width head_dim) or for index keys (width index_head_dim)."""

    def __init__(self, weights: CompressorWeights, ratio: int, freqs: Tensor, eps: float,
                 rounded: Callable[[Tensor], Tensor]) -> None:
        self.weights = weights
        self.ratio = ratio
        self.freqs = freqs
        self.eps = eps
        self.rounded = rounded

    def __call__(self, x: Tensor, start: int, memory: Compressed) -> None:
        """Takes the normed inputs x [t, hidden] of tokens start .. start + t; stores the entries that they complete."""
        w = self.weights
        pooled = compress(linear(x, w.wkv), linear(x, w.wgate), w.ape, memory.pending, start)
        if len(pooled):
            firsts = torch.arange(len(pooled)) * self.ratio + start // self.ratio * self.ratio
            entries = rotate(rms_norm(pooled, w.norm, self.eps), turns(firsts, self.freqs))
            memory.store.append(self.rounded(entries))
