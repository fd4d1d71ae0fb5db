"""What all layers of one forward pass share: the tokens, where they stand, and how far each position turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.norm_rope import Yarn, frequencies, turns
from dsv4_quant.config import ModelConfig
from dsv4cli.model.recording import ByHost, at_once


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

    Whatever depends on positions alone is made once, here, on the device of the ids; it lives as long as the step. `live` is
    None, or int64 [1]: the only token's position in the device's memory. Kernels then read it there, all else is computed from
    it, and `start` only says of what kind the token is, so that the launches of one step serve the next one of its kind. What the
    host has to do in the middle of a step goes through `by_host`.
    """

    ids: Tensor
    start: int
    positions: Tensor
    window_turns: Tensor
    compress_turns: Tensor
    live: Tensor | None
    by_host: ByHost
    _rope: Rope
    _groups: dict[int, Groups] = field(default_factory=dict)
    _rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def at(cls, ids: Tensor, start: int, rope: Rope, live: Tensor | None = None, by_host: ByHost = at_once) -> Step:
        positions = torch.arange(start, start + len(ids), device=ids.device) if live is None else live
        return cls(ids, start, positions, turns(positions, rope.window), turns(positions, rope.compress), live, by_host,
                   rope)

    def to(self, device: torch.device, rope: Rope) -> Step:
        """The same step for layers on another device, where `rope` lies too."""
        return Step.at(self.ids.to(device), self.start, rope, None if self.live is None else self.live.to(device), self.by_host)

    def groups(self, ratio: int) -> Groups:
        """The groups of all layers that compress `ratio` tokens into one."""
        if ratio not in self._groups:
            begin, end = self.start // ratio, (self.start + len(self.ids)) // ratio
            if self.live is not None and end > begin:
                firsts = self.entry_row(ratio) * ratio
            else:
                firsts = torch.arange(begin, end, device=self.ids.device) * ratio
            self._groups[ratio] = Groups((self.positions + 1) // ratio, turns(firsts, self._rope.compress))
        return self._groups[ratio]

    def ring_row(self, window: int) -> Tensor:
        """int64 [1]: where a ring keeps the key of a live step's token."""
        return self._row(("ring", window), lambda position: position % window)

    def entry_row(self, ratio: int) -> Tensor:
        """int64 [1]: which entry a live step's token belongs to."""
        return self._row(("entry", ratio), lambda position: position // ratio)

    def _row(self, name: tuple[str, int], of: Callable[[Tensor], Tensor]) -> Tensor:
        if name not in self._rows:
            assert self.live is not None, "the host knows where other steps' tokens go"
            self._rows[name] = of(self.live)
        return self._rows[name]
