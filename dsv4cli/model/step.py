"""What all layers of one forward pass share: the tokens, where they stand, and how far each position turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

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

    def to(self, device: torch.device) -> Rope:
        return Rope(self.window.to(device), self.compress.to(device))


class Groups(NamedTuple):
    """Groups of `ratio` tokens, each of which becomes an entry: `visible` int64 [t], how many are full for each token;
    turns complex64 [groups, pairs] of those that the step completes, which stand where their first tokens do."""

    visible: Tensor
    turns: Tensor


@dataclass(frozen=True)
class Step:
    """Tokens ids int64 [t] at positions start .. start + t; turns complex64 [t, pairs] for both kinds of layer.

    Whatever depends on positions alone is made once, here, on the device of the ids; it lives as long as the step.
    """

    ids: Tensor
    start: int
    positions: Tensor
    window_turns: Tensor
    compress_turns: Tensor
    _rope: Rope
    _groups: dict[int, Groups] = field(default_factory=dict)

    @classmethod
    def at(cls, ids: Tensor, start: int, rope: Rope) -> Step:
        positions = torch.arange(start, start + len(ids), device=ids.device)
        return cls(ids, start, positions, turns(positions, rope.window), turns(positions, rope.compress), rope)

    def groups(self, ratio: int) -> Groups:
        """The groups of all layers that compress `ratio` tokens into one."""
        if ratio not in self._groups:
            end = (self.start + len(self.ids)) // ratio
            firsts = torch.arange(self.start // ratio, end, device=self.ids.device) * ratio
            self._groups[ratio] = Groups((self.positions + 1) // ratio, turns(firsts, self._rope.compress))
        return self._groups[ratio]
