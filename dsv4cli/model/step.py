"""What all layers of one forward pass share: the tokens, where they stand, and how far each position turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.norm_rope import Entry, Yarn, frequencies, place_token, turns
from dsv4_quant.config import ModelConfig
from dsv4cli.model.recording import ByHost, at_once


@dataclass(frozen=True)
class Rope:
    """What positions mean to a model. Frequencies float32 [pairs]: `window` for layers without compression, `compress` for
    everything in the others; `ring`: tokens of a window; `ratios`: how many tokens become an entry in this layer or that."""

    window: Tensor
    compress: Tensor
    ring: int
    ratios: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Rope:
        scaling, dims = config.rope_scaling, config.qk_rope_head_dim
        yarn = Yarn(scaling.factor, scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow)
        ratios = {config.ratio(layer) for layer in range(config.num_hidden_layers)} - {0}
        return cls(frequencies(dims, config.rope_theta), frequencies(dims, config.compress_rope_theta, yarn),
                   config.sliding_window, tuple(sorted(ratios)))

    def to(self, device: torch.device) -> Rope:
        return Rope(self.window.to(device), self.compress.to(device), self.ring, self.ratios)


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
    window_turns: Tensor
    compress_turns: Tensor
    live: Tensor | None
    ring_row: Tensor | None  # int64 [1]: where a ring keeps the key of a live step's token
    by_host: ByHost
    _rope: Rope
    _entries: dict[int, Entry] = field(default_factory=dict)  # of a live step's token, by ratio
    _groups: dict[int, Groups] = field(default_factory=dict)

    @classmethod
    def at(cls, ids: Tensor, start: int, rope: Rope, live: Tensor | None = None, by_host: ByHost = at_once) -> Step:
        if live is None:
            positions = torch.arange(start, start + len(ids), device=ids.device)
            return cls(ids, start, turns(positions, rope.window), turns(positions, rope.compress), None, None, by_host, rope)
        near, far, row, entries = place_token(live, rope.window, rope.compress, rope.ring, rope.ratios)
        return cls(ids, start, near, far, live, row, by_host, rope, dict(zip(rope.ratios, entries, strict=True)))

    def to(self, device: torch.device, rope: Rope) -> Step:
        """The same step for layers on another device, where `rope` lies too."""
        return Step.at(self.ids.to(device), self.start, rope, None if self.live is None else self.live.to(device), self.by_host)

    def groups(self, ratio: int) -> Groups:
        """The groups of all layers that compress `ratio` tokens into one."""
        if ratio not in self._groups:
            begin, end, device = self.start // ratio, (self.start + len(self.ids)) // ratio, self.ids.device
            if self.live is not None:
                entry = self._entries[ratio]
                self._groups[ratio] = Groups(entry.visible, entry.turns[:end - begin])
            else:
                full = torch.arange(self.start + 1, self.start + len(self.ids) + 1, device=device) // ratio
                self._groups[ratio] = Groups(full, turns(torch.arange(begin, end, device=device) * ratio, self._rope.compress))
        return self._groups[ratio]

    def entry_row(self, ratio: int) -> Tensor:
        """int64 [1]: which entry a live step's token belongs to."""
        return self._entries[ratio].row
