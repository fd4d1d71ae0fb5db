"""How fast a model would decode on other people's machines, by where its experts lie: a simulation.

    python benchmarks/placement.py [--tokens 400] [--skew 0,0.5,1] [--recorded [MODEL]]
    python benchmarks/placement.py --host

Traces go through dsv4cli.engine.placement and the arithmetic of dsv4cli.engine.rates. The machines' rates are assumptions, not
measurements. Each skew is the exponent of a Zipf distribution over a layer's experts. The first half of a trace is learned
from, the second half is timed. With --recorded also choices that a model (tiny) made in conversations are replayed, on machines
with as large a part of its experts in VRAM. --host measures, on this machine, what the host's part of a layer takes beside
computing: with experts so small that they take next to no time.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from itertools import accumulate
from time import perf_counter
from typing import Any, NamedTuple

from dsv4cli.engine.placement import (
    Expert,
    Learner,
    Load,
    Placement,
    Rates,
    Token,
    by_counts,
    by_time,
    fewest_misses,
    token_seconds,
    uses_of,
)
from dsv4cli.engine.rates import Costs

GB = 1e9
KERNEL = 0.75  # of a memory's bandwidth that kernels reach; what rivals publish for theirs
LAUNCH_S = 1e-6  # lost between two launches of a captured graph
PIECE_S = 2e-6  # and between two graphs that are on their way one behind the other
READ_S = 16e-6  # until the CPU's kernels know what a layer chose
JOIN_S = 16e-6  # until the GPU goes on with what the CPU computed
CPU_LAYER_S = 60e-6  # lost in every layer without a GPU
HORIZON = 256  # tokens between two exchanges, in which a copy has to pay
# MXFP4 experts; of Q8_0 what is dense, some 7.3 GB over Flash's 43 layers, the shared experts among it
FLASH = Load(43, 256, 3 * 4096 * 2048 * 17 // 32, 143_000_000, 3 * 4096 * 2048 * 34 // 32)
PRO = Load(61, 384, 3 * 7168 * 3072 * 17 // 32, 375_000_000, 3 * 7168 * 3072 * 34 // 32)
POLICIES, BOUNDS = ("first layers", "LRU", "hot"), ("placement bound", "split bound", "clairvoyant")
QUESTIONS = ("What is {0} + {1}?", "What is the capital of France?", "My name is Anna. What is my name?", "Tell me a story.",
             "What is the capital of Japan? Then add {0} and {1}.", "Hello!")
DOOR = "experts_into_streams"  # of the kernels, to which a router is given
CHOSEN, HASHED = 6, 3  # experts a token visits in a layer; first layers, routed by token id


class Launches(NamedTuple):
    """Of a decoded token in one layer: all of them where it is whole on the card; else until the host is told the choice,
    beside the host, and behind its answer."""

    whole: int
    told: int
    beside: int
    behind: int


# By ratio, of a token that completes no group but has to choose entries, as tests/model/test_launches.py counts them.
LAUNCHES = {0: Launches(12, 11, 2, 1), 4: Launches(14, 13, 2, 1), 128: Launches(12, 11, 2, 1)}
RATIOS = {FLASH: {0: 2, 4: 21, 128: 20}, PRO: {4: 30, 128: 31}}  # layers of each


def launched(load: Load) -> tuple[float, float, float]:
    """Launches of a layer, on average: that nothing hides where it is whole; that many more where the host has a part; and those
    beside the host."""
    layers = RATIOS[load]
    whole, told, beside, behind = (sum(count * each for count, each in zip(layers.values(), column, strict=True)) / load.layers
                                   for column in zip(*(LAUNCHES[ratio] for ratio in layers), strict=True))
    return whole, told + behind - whole, beside


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
    model: Load = FLASH  # whose layers' launches are counted
    visits: int = 6  # experts that a token chooses in a layer

    def costs(self, lost: bool = True) -> Costs:
        """lost: whether launches and hand-overs take time."""
        load, ram = self.load, KERNEL * self.ram_gb_s * GB
        fast, near = KERNEL * self.vram_gb_s * GB if self.vram else ram, load.expert_bytes / ram
        costs = Costs(load.dense_bytes / fast, load.shared_bytes / fast, load.expert_bytes / fast, near,
                      near + load.expert_bytes / (self.disk_gb_s * GB), 0.0, card=self.vram > 0)
        if not lost:
            return costs
        if not costs.card:
            return replace(costs, lost=CPU_LAYER_S)
        lost, more, beside = (count * LAUNCH_S for count in launched(self.model))
        return replace(costs, lost=lost, parted=more, beside=beside + PIECE_S, read=READ_S, join=JOIN_S)

    def rates(self) -> Rates:
        kernels = [KERNEL * rate * GB for rate in (self.vram_gb_s, self.ram_gb_s)]
        return Rates(*kernels, self.disk_gb_s * GB, self.link_gb_s * GB)

    def slots(self) -> tuple[int, int]:
        return int(self.vram * GB / self.load.expert_bytes), int(self.ram * GB / self.load.expert_bytes)


MACHINES = (
    Machine("RTX 4090, DDR5 x2, 192 GB", 12, 180, 1008, 75, 25, 6),
    Machine("RTX 5090, DDR4 x8, 256 GB", 20, 240, 1792, 145, 25, 6),
    Machine("RTX 3090, DDR4 x2, 128 GB", 12, 115, 936, 40, 25, 3),
    Machine("12 GB laptop, 64 GB", 2, 52, 432, 60, 12, 5),
    Machine("96 GB card, DDR5 x12, 384 GB", 84, 360, 1792, 380, 50, 6),
    Machine("CPU only, DDR5 x2, 192 GB", 0, 175, 0, 75, 25, 6),
    Machine("Pro, 32 GB card, DDR5 x12, 1.1 TB", 2, 1050, 1792, 380, 50, 6, PRO, PRO),
)


def trace(load: Load, skew: float, tokens: int, seed: int = 1) -> list[Token]:
    """Random choices: Zipf with its own order in every layer, even in the layers that are routed by token id."""
    rng = random.Random(seed)
    orders = [rng.sample(range(load.experts), load.experts) for _ in range(load.layers)]
    even, zipf = (list(accumulate((rank + 1) ** -power for rank in range(load.experts))) for power in (0.0, skew))
    return [[_choose(rng, orders[layer], even if layer < HASHED else zipf) for layer in range(load.layers)]
            for _ in range(tokens)]


def recorded(model: str, count: int) -> tuple[list[Token], int]:
    """The experts that a model chose for `count` tokens of conversations, and how many a layer has to choose from."""
    from dsv4_kernels import backends
    from dsv4_kernels.router import route
    from dsv4cli import Engine
    from dsv4cli.engine.sampling import Sampling

    engine, rng, tokens = Engine.open(model, threads=1), random.Random(1), list[Token]()
    session, layers, step = engine.session(), engine.config.num_hidden_layers, list[list[list[int]]]()

    def watch(door: str, given: tuple[Any, ...]) -> None:
        if door == DOOR:  # what the router will choose there
            x, ids, router, *_ = given
            step.append(route(x, router, ids)[1].tolist())
        if len(step) == layers:  # a prompt's tokens come together
            tokens.extend(zip(*step, strict=True))
            step.clear()

    with backends.watched(watch):
        while len(tokens) < count:
            before = len(tokens)
            asked = rng.choice(QUESTIONS).format(rng.randrange(100), rng.randrange(100))
            for _ in engine.chat([{"role": "user", "content": asked}], session=session, sampling=Sampling(seed=len(tokens))):
                if len(tokens) >= count:
                    break
            if len(tokens) == before:
                raise SystemExit(f"{model} answered, and through the door {DOOR} came no choice of {layers} layers. "
                                 "Experts have another door now; name it in DOOR.")
    return tokens[:count], engine.config.n_routed_experts


def shrunk(machine: Machine, tokens: list[Token], experts: int) -> Machine:
    """The machine with as large a part of these tokens' experts in each tier as it has of its own model's, which cost as much."""
    layers, visits = len(tokens[0]), len(tokens[0][0])
    part = layers * experts / (machine.load.layers * machine.load.experts)
    load = replace(machine.load, layers=layers, experts=experts)
    return replace(machine, load=load, vram=part * machine.vram, ram=part * machine.ram, visits=visits)


def busier(tokens: list[Token], experts: int) -> float:
    """How often one of the more frequent half of a layer's experts was chosen, the halves as the whole trace tells them."""
    counts = Counter(uses_of(tokens))
    layers = ([counts[layer, number] for number in range(experts)] for layer in range(len(tokens[0])))
    return sum(sum(sorted(layer, reverse=True)[:experts // 2]) for layer in layers) / sum(counts.values())


def _choose(rng: random.Random, order: list[int], weights: list[float]) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < CHOSEN:
        chosen[rng.choices(order, cum_weights=weights)[0]] = None
    return list(chosen)


def static_rate(tokens: list[Token], placement: Placement, machine: Machine, lost: bool = True) -> float:
    costs = machine.costs(lost)
    return len(tokens) / sum(token_seconds(token, placement, machine.load, costs) for token in tokens)


def dealt(counts: Counter[Expert], machine: Machine, lost: bool = True) -> Placement:
    """Our policy's places for what was counted."""
    return by_time(counts, machine.load, machine.costs(lost), machine.visits, *machine.slots())


def hot_rate(past: list[Token], tokens: list[Token], machine: Machine) -> float:
    """Tokens a second of our policy: starts from what was learned, exchanges as it goes, and pays for its copies."""
    load, costs, counts = machine.load, machine.costs(), Counter(uses_of(past))
    learner = Learner(dealt(counts, machine), counts, len(past), load, machine.rates(), HORIZON, across=False)
    seconds = sum(token_seconds(token, learner.placement, load, costs) + learner.observe(token) for token in tokens)
    return len(tokens) / seconds


class Recent:
    """Keeps what was chosen last: VRAM's oldest expert falls into RAM, RAM's oldest out of it."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        placement.kept.clear()  # whatever lies there may leave, so no layer is ever known to be whole
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
    load, costs = machine.load, machine.costs()
    if machine.vram:
        fetched = load.expert_bytes / machine.rates().link
        costs = replace(costs, near=fetched, far=fetched + load.expert_bytes / machine.rates().disk)
    recent = Recent(by_counts(Counter(), load, *machine.slots()))
    for expert in uses_of(past):
        recent.touch(expert)
    seconds = 0.0
    for token in tokens:
        seconds += token_seconds(token, recent.placement, load, costs)
        for expert in uses_of([token]):
            recent.touch(expert)
    return len(tokens) / seconds


def clairvoyant_rate(tokens: list[Token], machine: Machine) -> float:
    """As many hits as knowing the future allows, starting full for nothing, free copies, no time lost in layers."""
    uses, load, costs, (vram, ram) = uses_of(tokens), machine.load, machine.costs(lost=False), machine.slots()
    compulsory = len(set(uses))
    away = max(0, fewest_misses(uses, vram) - min(vram, compulsory)) if vram else len(uses)
    far = min(away, max(0, fewest_misses(uses, vram + ram) - min(vram + ram, compulsory)))
    beside = (away - far) * costs.near + far * costs.far
    layers = len(tokens) * load.layers
    hits = layers * costs.shared + (len(uses) - away) * costs.hit
    together = max(hits, beside) if costs.card else layers * costs.shared + beside
    return len(tokens) / (layers * costs.dense + together)


def compare(machine: Machine, tokens: list[Token]) -> dict[str, float]:
    """Tokens a second by policy, and by bound, for the second half of a trace.

    placement bound: the policy's own way of dealing, but from the very tokens that are timed, and with the policies' time lost
    in layers, so that only the knowledge differs. split bound: dealt for no time lost in layers, and timed so.
    """
    past, timed = tokens[:len(tokens) // 2], tokens[len(tokens) // 2:]
    nothing, known = by_counts(Counter(), machine.load, *machine.slots()), Counter(uses_of(timed))
    counted = by_counts(known, machine.load, *machine.slots())
    return {"first layers": static_rate(timed, nothing, machine), "LRU": recent_rate(past, timed, machine),
            "hot": hot_rate(past, timed, machine),
            "placement bound": max(static_rate(timed, dealt(known, machine), machine), static_rate(timed, counted, machine)),
            "split bound": max(static_rate(timed, dealt(known, machine, lost=False), machine, lost=False),
                               static_rate(timed, counted, machine, lost=False)),
            "clairvoyant": clairvoyant_rate(timed, machine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--skew", default="0,0.5,1")
    parser.add_argument("--recorded", metavar="MODEL", nargs="?", const="tiny")
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    if options.host:
        print(", ".join(f"{1e6 * host_seconds(missed):.1f} us with {missed} of {CHOSEN} missed" for missed in (0, 3, CHOSEN)))
        return
    print("| machine | skew |", " | ".join((*POLICIES, *BOUNDS, *(f"hot / {name}" for name in BOUNDS))), "|")
    print("|---" * (2 + len(POLICIES) + 2 * len(BOUNDS)) + "|")
    for machine in MACHINES:
        for skew in map(float, options.skew.split(",")):
            show(machine.name, f"{skew:g}", compare(machine, trace(machine.load, skew, options.tokens)))
    if options.recorded:
        tokens, experts = recorded(options.recorded, options.tokens)
        for machine in MACHINES:
            show(machine.name, options.recorded, compare(shrunk(machine, tokens, experts), tokens))
        print(f"The busier half of {options.recorded}'s experts were chosen {busier(tokens, experts):.0%} of the time.")


def host_seconds(missed: int, times: int = 2000) -> float:
    """Of the host's part of one layer, from the choice that has come to the part that is computed, `missed` of six experts."""
    import torch

    from dsv4_kernels.moe import Expert, Experts
    from dsv4_quant.formats import Packed
    from dsv4cli.model.experts import TieredExperts
    from dsv4cli.model.slots import Room

    weight = Packed("q8_0", (32, 32), torch.zeros(32, 34, dtype=torch.uint8))
    experts = Experts([Expert(weight, weight, weight)] * FLASH.experts)
    layer = TieredExperts([experts], [Room("cpu", 0, 1, CHOSEN)], CHOSEN, [(0, number) for number in range(CHOSEN)]).layers[0]
    layer.desk.told.experts.copy_(torch.arange(missed, missed + CHOSEN))
    best = float("inf")
    for _ in range(7):
        start = perf_counter()
        with torch.inference_mode():
            for _ in range(times):
                layer.answer(10.0)
        best = min(best, (perf_counter() - start) / times)
        layer.seen.clear()
    return best


def show(name: str, skew: str, rates: dict[str, float]) -> None:
    cells = [f"{rates[name]:.2f}" for name in (*POLICIES, *BOUNDS)]
    cells += [f"{rates['hot'] / rates[name]:.2f}" for name in BOUNDS]
    print(f"| {name} | {skew} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
