"""How fast a model would decode on other people's machines, by where its experts lie: a simulation.

    python benchmarks/placement.py [--tokens 400] [--skew 0,0.5,1] [--cpu benchmarks/results/cpu.csv]

Synthetic traces go through dsv4cli.engine.placement. The machines' rates are assumptions, not measurements. Each skew
is the exponent of a Zipf distribution over a layer's experts. The first half of a trace
is learned from, the second half is timed.
With --cpu it also says how well measured rates of one file are foretold from the fractions that other files reached.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median

from dsv4cli.engine.placement import (
    Expert,
    Learner,
    Load,
    Placement,
    Rates,
    Token,
    by_counts,
    fewest_misses,
    token_seconds,
    uses_of,
)

GB = 1e9
KERNEL = 0.75  # of a memory's bandwidth that kernels reach; what rivals publish for theirs
LAYER_S = 60e-6  # lost once a layer: launches, the hand-over between GPU and CPU
HORIZON = 256  # tokens between two exchanges, in which a copy has to pay
FLASH = Load(43, 256, 3 * 4096 * 2048 * 17 // 32, 170_000_000)  # MXFP4 experts; dense: some 7.3 GB of Q8_0 over 43 layers
PRO = Load(61, 384, 3 * 7168 * 3072 * 17 // 32, 445_000_000)
CHOSEN, HASHED = 6, 3  # experts a token visits in a layer; first layers, routed by token id


@dataclass(frozen=True)
class Machine:
    """Capacities in GB left for experts, bandwidths in GB/s as the makers or STREAM state them."""

    name: str
    vram: float
    ram: float
    vram_gb_s: float
    ram_gb_s: float
    link_gb_s: float
    disk_gb_s: float
    load: Load = FLASH

    def rates(self, layer_s: float) -> Rates:
        kernels = [KERNEL * rate * GB for rate in (self.vram_gb_s, self.ram_gb_s)]
        return Rates(*kernels, self.disk_gb_s * GB, self.link_gb_s * GB, layer_s)

    def slots(self) -> tuple[int, int]:
        return int(self.vram * GB / self.load.expert_bytes), int(self.ram * GB / self.load.expert_bytes)


MACHINES = (
    Machine("RTX 4090, DDR5 x2, 192 GB", 12, 180, 1008, 75, 25, 6),
    Machine("RTX 5090, DDR4 x8, 256 GB", 20, 240, 1792, 145, 25, 6),
    Machine("RTX 3090, DDR4 x2, 128 GB", 12, 115, 936, 40, 25, 3),
    Machine("12 GB laptop, 64 GB", 2, 52, 432, 60, 12, 5),
    Machine("96 GB card, DDR5 x12, 384 GB", 84, 360, 1792, 380, 50, 6),
    Machine("CPU only, DDR5 x2, 192 GB", 0, 175, 0, 75, 25, 6),
    Machine("Pro, 32 GB card, DDR5 x12, 1.1 TB", 2, 1050, 1792, 380, 50, 6, PRO),
)


def trace(load: Load, skew: float, tokens: int, seed: int = 1) -> list[Token]:
    """Random choices: Zipf with its own order in every layer, even in the layers that are routed by token id."""
    rng = random.Random(seed)
    orders = [rng.sample(range(load.experts), load.experts) for _ in range(load.layers)]
    even, zipf = (list(accumulate((rank + 1) ** -power for rank in range(load.experts))) for power in (0.0, skew))
    return [[_choose(rng, orders[layer], even if layer < HASHED else zipf) for layer in range(load.layers)]
            for _ in range(tokens)]


def _choose(rng: random.Random, order: list[int], weights: list[float]) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < CHOSEN:
        chosen[rng.choices(order, cum_weights=weights)[0]] = None
    return list(chosen)


def static_rate(tokens: list[Token], placement: Placement, machine: Machine, layer_s: float = LAYER_S) -> float:
    return len(tokens) / sum(token_seconds(token, placement, machine.load, machine.rates(layer_s)) for token in tokens)


def hot_rate(past: list[Token], tokens: list[Token], machine: Machine) -> float:
    """Tokens a second of our policy: starts from what was learned, exchanges as it goes, and pays for its copies."""
    load, rates, counts = machine.load, machine.rates(LAYER_S), Counter(uses_of(past))
    learner = Learner(by_counts(counts, load, *machine.slots()), counts, len(past), load, rates, HORIZON)
    seconds = sum(token_seconds(token, learner.placement, load, rates) + learner.observe(token) for token in tokens)
    return len(tokens) / seconds


class Recent:
    """Keeps what was chosen last: VRAM's oldest expert falls into RAM, RAM's oldest out of it."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.tiers = [(tier, len(tier), OrderedDict.fromkeys(sorted(tier))) for tier in (placement.vram, placement.ram)]

    def touch(self, expert: Expert) -> None:
        for tier, _, order in self.tiers:
            tier.discard(expert)
            order.pop(expert, None)
        falling = expert
        for tier, slots, order in self.tiers:
            tier.add(falling)
            order[falling] = None
            if len(order) <= slots:
                return
            falling, _ = order.popitem(last=False)
            tier.discard(falling)


def recent_rate(past: list[Token], tokens: list[Token], machine: Machine) -> float:
    """Tokens a second of the usual cache: a GPU computes every expert itself and fetches what it lacks, beside its hits."""
    load, rates = machine.load, machine.rates(LAYER_S)
    fetching = replace(rates, ram=rates.link) if machine.vram else rates
    recent = Recent(by_counts(Counter(), load, *machine.slots()))
    for expert in uses_of(past):
        recent.touch(expert)
    seconds = 0.0
    for token in tokens:
        seconds += token_seconds(token, recent.placement, load, fetching)
        for expert in uses_of([token]):
            recent.touch(expert)
    return len(tokens) / seconds


def clairvoyant_rate(tokens: list[Token], machine: Machine) -> float:
    """As many hits as knowing the future allows, starting full for nothing, free copies, no time lost in layers."""
    uses, load, rates, (vram, ram) = uses_of(tokens), machine.load, machine.rates(0), machine.slots()
    compulsory = len(set(uses))
    away = max(0, fewest_misses(uses, vram) - min(vram, compulsory)) if vram else len(uses)
    far = max(0, fewest_misses(uses, vram + ram) - min(vram + ram, compulsory))
    fast = rates.vram or rates.ram
    beside = load.expert_bytes * ((away - min(far, away)) / rates.ram + far / rates.disk)
    hits = (len(uses) - away) * load.expert_bytes / fast
    return len(tokens) / (len(tokens) * load.layers * load.dense_bytes / fast + max(hits, beside))


def compare(machine: Machine, skew: float, count: int) -> dict[str, float]:
    """Tokens a second by policy, and by bound.

    placement bound: the fixed placement with the most hits in hindsight, with the policies' own time lost in layers, so
    that only the choice of places differs. split bound: the same placement with none lost.
    """
    tokens = trace(machine.load, skew, count)
    past, timed = tokens[:count // 2], tokens[count // 2:]
    nothing = by_counts(Counter(), machine.load, *machine.slots())
    hindsight = by_counts(Counter(uses_of(timed)), machine.load, *machine.slots())
    return {"first layers": static_rate(timed, nothing, machine), "LRU": recent_rate(past, timed, machine),
            "hot": hot_rate(past, timed, machine), "placement bound": static_rate(timed, hindsight, machine),
            "split bound": static_rate(timed, hindsight, machine, 0.0), "clairvoyant": clairvoyant_rate(timed, machine)}


def foretold(path: Path) -> list[tuple[str, float, float]]:
    """File, rate foretold, rate measured: its bound times the median fraction of all rows of other files."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [(row["file"], float(row["bound"]) * median(float(other["fraction"]) for other in rows
                                                        if other["file"] != row["file"]), float(row["dsv4_decode"]))
            for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--skew", default="0,0.5,1")
    parser.add_argument("--cpu", type=Path)
    options = parser.parse_args()
    policies, bounds = ("first layers", "LRU", "hot"), ("placement bound", "split bound", "clairvoyant")
    print("| machine | skew |", " | ".join((*policies, *bounds, *(f"hot / {name}" for name in bounds))), "|")
    print("|---" * (2 + len(policies) + 2 * len(bounds)) + "|")
    for machine in MACHINES:
        for skew in map(float, options.skew.split(",")):
            rates = compare(machine, skew, options.tokens)
            cells = [f"{rates[name]:.2f}" for name in (*policies, *bounds)]
            cells += [f"{rates['hot'] / rates[name]:.2f}" for name in bounds]
            print(f"| {machine.name} | {skew:g} |", " | ".join(cells), "|", flush=True)
    for name, told, measured in foretold(options.cpu) if options.cpu else ():
        print(f"{name}: foretold {told:.1f}, measured {measured:.1f} tok/s ({told / measured - 1:+.0%})")


if __name__ == "__main__":
    main()
