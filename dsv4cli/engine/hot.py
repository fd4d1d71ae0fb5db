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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import finalize

from dsv4_quant.config import ModelConfig
from dsv4cli import console, paths
from dsv4cli.engine import machine
from dsv4cli.engine.atomic import whole_file
from dsv4cli.engine.placement import Expert, Learner, Load, Placement, Rates
from dsv4cli.errors import Dsv4Error
from dsv4cli.model.experts import TieredExperts

HORIZON = 256  # tokens between two exchanges, in which a copy has to pay
MEMORY, LINK, DISK = 40e9, 12e9, 2e9  # bytes a second, where the machine was never measured
CARD = 10  # times the memory's rate: a card whose rate nobody measured. Between 5 and 25, exchanges hardly differ


@dataclass
class Counts:
    """How often each expert was chosen, and in how many tokens."""

    layers: int
    experts: int
    chosen: Counter[Expert] = field(default_factory=Counter)
    seen: float = 0

    def ranked(self) -> list[Expert]:
        """All experts, the most frequent first. Those never seen are dealt evenly to the layers, so that card and CPU share
        the work of each."""
        everyone = ((layer, number) for number in range(self.experts) for layer in range(self.layers))
        return sorted(everyone, key=lambda expert: (-self.chosen[expert], expert[1], expert[0]))

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

    def __init__(self, tiers: TieredExperts, counts: Counts, expert_bytes: int, path: Path,
                 say: Callable[[str], None] = console.note) -> None:
        """counts: learned before, and changed from now on. path: where to keep them. say: takes a sentence for the user."""
        self.tiers, self.counts = tiers, counts
        self._path, self._say, self._told = path, say, False
        load, rates = Load(counts.layers, counts.experts, expert_bytes, 0), _rates()
        self.learners = []
        for room, resident in zip(tiers.rooms, tiers.resident, strict=True):
            everyone = {(layer, number) for layer in range(room.first, room.last) for number in range(counts.experts)}
            own = Counter({expert: count for expert, count in counts.chosen.items() if expert in everyone})
            self.learners.append(Learner(Placement(resident, everyone - resident), own, counts.seen, load, rates, HORIZON))
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
        for number in layers:
            seen = self.tiers.layers[number].seen
            tokens = sum(len(chosen) for chosen in seen)
            for chosen in seen:
                times = chosen.cpu().flatten().bincount().tolist()
                found.update({(number, expert): count for expert, count in enumerate(times) if count})
            seen.clear()
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


def _rates() -> Rates:
    """Of this machine, as far as it was measured."""
    known = machine.load()
    memory = (known and known.memory) or MEMORY
    return Rates(CARD * memory, memory, (known and known.sequential) or DISK, (known and known.to_gpu) or LINK, 0.0)
