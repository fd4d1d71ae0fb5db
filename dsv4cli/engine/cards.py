"""What graphics cards hold of a model: whole layers each, and of their routed experts as many as there is room for. No torch.

A card keeps everything of its layers that every token needs (dense weights, shared experts, caches, buffers) and fills what
is left with slots for routed experts. A slot has the size of the largest expert of the card's layers, so that any of them can
take the place of any other. The experts without a slot stay in the mapped file, where the CPU computes them; large batches
copy some of them at a time, through as many bytes of pinned memory as of the card's, for the copy of one half and the
products of the other overlap.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from dsv4_quant.files.headers import Header
from dsv4cli.model import sizes

ON_CARD = 500_000_000  # bytes for compiled kernels and what torch's allocator cannot use; a guess until a card was there
UNREAD = ("mtp", "other")  # roles that the trunk does not read
UNLIMITED = 1 << 62  # bytes of a card of which nobody tells
LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")


@dataclass(frozen=True)
class CardShare:
    """What one card holds, in bytes. `available` is what this process may use of it, None where nobody tells; then there is a
    slot for every expert. `model/experts.py` makes `slots` slots of `expert` bytes for the layers first .. last - 1."""

    first: int  # its layers are first .. last - 1
    last: int
    available: int | None
    program: int  # compiled kernels, and what the allocator cannot use
    dense: int  # weights but routed experts; the embedding is with the first layer, what follows the last with that
    state: int  # caches and compressor state of these layers at a full context
    snapshots: int  # the most that a session may keep of them to go back to
    scratch: int  # the largest temporary tensors of a prompt chunk
    index_scores: int  # what an indexer scores at once
    expert: int  # the largest routed expert of these layers: the size of a slot
    experts: int  # how many routed experts these layers have; 0 where they are expanded
    slots: int  # how many of them lie on the card, in slots * expert bytes
    staging: int = 0  # buffers for experts that a large batch brings along; 0 where all have a slot
    expanded: int = 0  # float32 copies of a small model, in the place of all its weights

    @property
    def fixed(self) -> int:
        """What has to be on the card, with no expert in a slot."""
        return self.needed - self.slots * self.expert

    @property
    def needed(self) -> int:
        """With an expert in each slot."""
        return sum(self.sizes().values())

    @property
    def whole(self) -> int:
        """With every expert of these layers on the card."""
        return self.fixed - self.staging + self.experts * self.expert

    @property
    def runs(self) -> bool:
        """Whether what has to be on the card fits."""
        return self.available is None or self.fixed <= self.available

    def sizes(self) -> dict[str, int]:
        """Bytes by what they are for, in words."""
        return {"program": self.program, "weights": self.dense, "expanded weights": self.expanded, "state": self.state,
                "snapshots": self.snapshots, "scratch": self.scratch, "index scores": self.index_scores,
                "expert buffers": self.staging, "routed experts": self.slots * self.expert}


@dataclass(frozen=True)
class Buffers:
    """Bytes that every card needs beside what it holds, whatever its layers are."""

    scratch: int
    index_scores: int
    program: int = ON_CARD


class _Layer(NamedTuple):
    """One layer's bytes, and how many routed experts it has."""

    dense: int
    state: int
    expert: int
    experts: int

    @property
    def whole(self) -> int:
        return self.dense + 2 * self.state + self.experts * self.expert


def shares(header: Header, free: Sequence[int | None], tokens: int, numerics: str, buffers: Buffers) -> tuple[CardShare, ...]:
    """The shares of cards of which `free` bytes each may be used, for a context of `tokens`.

    Layers are dealt in order, by what each card has left beside its buffers, so that all have room for about the same
    fraction of their experts. A card that is too small for any layer gets none and is left out.
    """
    config = header.config
    if expanded := sizes.expanded_bytes(config, header.tensor_bytes):
        state = sizes.state_bytes(config, tokens, numerics, packed=numerics == "official")
        return (CardShare(0, config.num_hidden_layers, free[0], buffers.program, 0, state, state, buffers.scratch,
                          buffers.index_scores, 0, 0, 0, expanded=expanded),)
    layers, before, behind = _layers(header, tokens, numerics)
    room = [UNLIMITED if size is None else max(0, size - buffers.program - buffers.scratch - buffers.index_scores)
            for size in free]
    bounds = _dealt([before, *(layer.whole for layer in layers), behind], room)
    return tuple(_share(layers, (first, last), size, before * (first == 0) + behind * (last == len(layers)), buffers,
                        2 * config.num_experts_per_tok)
                 for first, last, size in zip([0, *bounds], bounds, free, strict=False) if last > first)


def _layers(header: Header, tokens: int, numerics: str) -> tuple[list[_Layer], int, int]:
    """Every layer, the bytes of the embedding before them, and those of the head behind."""
    config = header.config
    count, official = config.num_hidden_layers, numerics == "official"
    dense, routed, before, behind = [0] * count, [0] * count, 0, 0
    for role, infos in header.by_role().items():
        for info in infos if role not in UNREAD else ():
            if match := LAYER.match(info.name):
                (routed if role == "routed_expert" else dense)[int(match[1])] += info.nbytes
            elif role == "embed":
                before += info.nbytes
            else:
                behind += info.nbytes
    experts = config.n_routed_experts
    states = [sizes.layer_state_bytes(config, layer, tokens, numerics, packed=official) for layer in range(count)]
    return [_Layer(*each, experts) for each in zip(dense, states, (-(-size // experts) for size in routed), strict=True)], \
        before, behind


def _dealt(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """Where each card's layers end. sizes: of what is before the layers, of each layer, of what is behind the last."""
    reached = list(accumulate(sizes))
    ends, shared = list(accumulate(room)), max(1, sum(room))
    # a boundary goes to the layer whose end is the nearest to this card's share of everything
    return [*(_nearest(reached[:-1], reached[-1] * end // shared) for end in ends[:-1]), len(sizes) - 2]


def _nearest(reached: Sequence[int], wanted: int) -> int:
    place = bisect_left(reached, wanted)
    return min((near for near in (place - 1, place) if 0 <= near < len(reached)), key=lambda near: abs(reached[near] - wanted))


def _share(layers: Sequence[_Layer], bounds: tuple[int, int], available: int | None, ends: int, buffers: Buffers,
           staged: int) -> CardShare:
    """ends: bytes of embedding and head, where they lie on this card. staged: experts that the buffers take."""
    mine = layers[slice(*bounds)]
    state, expert = sum(layer.state for layer in mine), max(layer.expert for layer in mine)
    bare = CardShare(*bounds, available, buffers.program, ends + sum(layer.dense for layer in mine), state, state,
                     buffers.scratch, buffers.index_scores, expert, sum(layer.experts for layer in mine), 0)
    if available is None or bare.whole <= available:
        return replace(bare, slots=bare.experts)
    buffered = replace(bare, staging=staged * expert)
    return replace(buffered, slots=max(0, (available - buffered.fixed) // expert))
