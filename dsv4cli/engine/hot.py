"""Which routed experts to keep in a card's slots: those that were chosen most, as far as an exchange pays (engine.placement).

Counts are learned between tokens, from whatever sessions compute, and kept in the cache folder for the next start, by the
model's fingerprint. A file that cannot be understood counts as none: it can be learned again.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

from dsv4_quant.config import ModelConfig
from dsv4cli import console, paths
from dsv4cli.engine import machine
from dsv4cli.engine.atomic import whole_file
from dsv4cli.engine.cards import CardShare
from dsv4cli.engine.placement import Expert, Learner, Load, Placement, Rates, by_time
from dsv4cli.engine.rates import Costs
from dsv4cli.errors import Dsv4Error
from dsv4cli.model.experts import TieredExperts
from dsv4cli.model.slots import Room

HORIZON = 256  # tokens between two exchanges, in which a copy has to pay
MEMORY, VRAM, LINK, DISK = 40e9, 400e9, 12e9, 2e9  # bytes a second, where the machine was never measured
READ_S, JOIN_S = 16e-6, 16e-6  # until the host has the router's choice, and until the card has the CPU's part: assumed


class Pace(NamedTuple):
    """What decides where experts lie: sizes, seconds of a layer's parts, and rates of copies."""

    load: Load
    costs: Costs
    rates: Rates
    visits: int  # experts that a token chooses in a layer

    @classmethod
    def of(cls, config: ModelConfig, card: CardShare) -> Pace:
        """By what this machine was measured to reach, as far as it was. card: one that the model is opened on."""
        known = machine.load()
        rates = known.rates() if known else {}
        memory, vram = rates.get("memory") or MEMORY, rates.get("vram") or VRAM
        link, disk = rates.get("to_gpu") or LINK, rates.get("sequential") or DISK
        size, dense = card.expert, card.dense // max(1, card.last - card.first)
        near = size / memory
        costs = Costs(dense / vram, 0.0, size / vram, near, near + size / disk, 0.0, card=True, read=READ_S, join=JOIN_S)
        load = Load(config.num_hidden_layers, config.n_routed_experts, size, dense)
        return cls(load, costs, Rates(vram, memory, disk, link), config.num_experts_per_tok)


@dataclass
class Counts:
    """How often each expert was chosen, and in how many tokens."""

    layers: int
    experts: int
    chosen: Counter[Expert] = field(default_factory=Counter)
    seen: float = 0

    def dealt(self, rooms: Sequence[Room], pace: Pace) -> list[Expert]:
        """What belongs into the cards' slots, the most frequent first: as many of each layer as its time is worth."""
        found = []
        for room in rooms:
            own = Counter({(layer - room.first, number): count for (layer, number), count in self.chosen.items()
                           if room.first <= layer < room.last})
            load = replace(pace.load, layers=room.last - room.first)
            for layer, number in by_time(own, load, pace.costs, pace.visits, room.slots, 0).vram:
                found.append((layer + room.first, number))
        return sorted(found, key=lambda expert: (-self.chosen[expert], expert))

    def save(self, path: Path) -> None:
        """Whole or not at all. Raises Dsv4Error where it cannot be written."""
        rows = [[self.chosen[layer, number] for number in range(self.experts)] for layer in range(self.layers)]
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            draft.write_text(json.dumps({"seen": self.seen, "chosen": rows}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> Counts:
        """What was saved for a model of this shape; empty if nothing was, or nothing that makes sense."""
        empty = cls(config.num_hidden_layers, config.n_routed_experts)
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return empty
        if not empty._is_like(said):
            return empty
        chosen = {(layer, number): count for layer, row in enumerate(said["chosen"]) for number, count in enumerate(row) if count}
        return cls(empty.layers, empty.experts, Counter(chosen), said["seen"])

    def _is_like(self, said: Any) -> bool:
        if not isinstance(said, dict) or said.keys() != {"seen", "chosen"}:
            return False
        seen, rows = said["seen"], said["chosen"]
        return (type(seen) in (int, float) and 0 <= seen < math.inf and isinstance(rows, list) and len(rows) == self.layers
                and all(isinstance(row, list) and len(row) == self.experts for row in rows)
                and all(type(count) is int and count >= 0 for row in rows for count in row))


def counts_path(fingerprint: str) -> Path:
    """Where a model's counts lie, or would."""
    return paths.cache() / "experts" / f"{fingerprint}.json"


class Hot:
    """Keeps the experts in slots up to date. One for a model, whatever the number of sessions."""

    def __init__(self, tiers: TieredExperts, counts: Counts, pace: Pace, path: Path,
                 say: Callable[[str], None] = console.note) -> None:
        """counts: learned before, and changed from now on. path: where to keep them. say: takes a sentence for the user."""
        self.tiers, self.counts = tiers, counts
        self._path, self._say, self._told = path, say, False
        self.learners = []
        for room, resident in zip(tiers.rooms, tiers.resident, strict=True):
            everyone = {(layer, number) for layer in range(room.first, room.last) for number in range(counts.experts)}
            own = Counter({expert: count for expert, count in counts.chosen.items() if expert in everyone})
            self.learners.append(Learner(Placement(resident, everyone - resident), own, counts.seen, pace.load, pace.rates,
                                         HORIZON, across=False))
        self._finalizer = finalize(self, _keep, path, counts, self.learners)
        if tiers.lacking:
            self._say_smaller()

    def observe(self) -> None:
        """Counts what was chosen since the last time, and exchanges experts where that pays."""
        with self.tiers.lock:
            for number, (room, learner) in enumerate(zip(self.tiers.rooms, self.learners, strict=True)):
                chosen, tokens = self._chosen(range(room.first, room.last))
                if learner.observe_all(chosen, tokens):
                    here = self.tiers.resident[number]
                    self.tiers.replace(here - learner.placement.vram, learner.placement.vram - here)
                if number == 0 and tokens and learner.tokens % HORIZON < tokens:
                    _keep(self._path, self.counts, self.learners)

    def shrink(self) -> bool:
        """Gives memory of the cards' back, a part of the slots; the most frequent experts stay. False where nothing is left."""
        with self.tiers.lock:
            keep = [expert for learner in self.learners for expert in sorted(
                learner.placement.vram, key=lambda expert, of=learner.counts: (-of[expert], expert))]  # type: ignore[misc]
            if not self.tiers.shrink(keep):
                return False
            for room, learner, resident in zip(self.tiers.rooms, self.learners, self.tiers.resident, strict=True):
                everyone = {(layer, number) for layer in range(room.first, room.last) for number in range(self.counts.experts)}
                learner.placement = Placement(resident, everyone - resident)
            self._say_smaller()
            return True

    def _chosen(self, layers: range) -> tuple[Counter[Expert], int]:
        """How often each of the layers' experts was chosen since the last time, and in how many tokens."""
        found, tokens = Counter[Expert](), 0
        for number, chosen in self.tiers.chosen(layers):
            tokens += len(chosen) if number == layers.start else 0
            times = chosen.flatten().bincount().tolist()
            found.update({(number, expert): count for expert, count in enumerate(times) if count})
        return found, tokens

    def _say_smaller(self) -> None:
        if not self._told:
            self._told = True
            self._say(f"The GPU has less free memory than was planned with: {self.tiers.lacking:,} slots for experts fewer. "
                      "Those experts are computed by the CPU.")


def _keep(path: Path, counts: Counts, learners: Sequence[Learner]) -> None:
    """Saves what was learned, if anything was. Where that cannot be done, the next start begins with less."""
    if learners[0].tokens:
        counts.chosen = Counter({expert: count for learner in learners for expert, count in learner.counts.items() if count})
        counts.seen = learners[0].seen
        with suppress(Dsv4Error, OSError):
            counts.save(path)
