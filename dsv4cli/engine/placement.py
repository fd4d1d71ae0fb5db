"""Which routed experts lie in VRAM, in RAM or on the disk, and what a token then costs. Nothing here needs torch.

An expert is named by (layer, number). How many of a layer's experts lie in VRAM is dealt by time: a layer takes as long as the
slower of card and CPU, so hits that hide behind misses gain nothing, and a layer that is whole on the card need not ask the CPU.
Which ones is dealt by how often they were chosen; one that is resident gives way to another only where the seconds expected to
be saved exceed those of the copy, whatever that does to the rate of hits.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

from dsv4cli.engine.rates import Costs

Expert = tuple[int, int]  # layer, number
Token = Sequence[Sequence[int]]  # the experts chosen in each layer
MEMORY = 16  # horizons that counts remember


@dataclass(frozen=True)
class Load:
    """Bytes that a model reads: of one expert, and in each layer what every token needs before its experts are chosen, and of
    the shared expert."""

    layers: int
    experts: int
    expert_bytes: int
    dense_bytes: int
    shared_bytes: int = 0


@dataclass(frozen=True)
class Rates:
    """What a machine reaches with our kernels, in bytes a second, for whoever weighs a copy. `layer_s`: lost once a layer,
    wherever experts lie. No vram: CPU only."""

    vram: float
    ram: float
    disk: float
    link: float
    layer_s: float = 0.0


@dataclass
class Placement:
    """Experts in VRAM and in RAM; all others lie on the disk. `kept`: how many of a layer's are in VRAM."""

    vram: set[Expert]
    ram: set[Expert]
    kept: Counter[int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.count()

    def count(self) -> None:
        """Brings `kept` up to date."""
        self.kept = Counter(layer for layer, _ in self.vram)


def by_counts(counts: Counter[Expert], load: Load, vram_slots: int, ram_slots: int) -> Placement:
    """The most frequent experts into VRAM, the next into RAM. Ties, and experts never seen, go by layer and number."""
    ranked = _ranked(((layer, number) for layer in range(load.layers) for number in range(load.experts)), counts)
    end = vram_slots + ram_slots
    return Placement(set(ranked[:vram_slots]), set(ranked[vram_slots:end]))


def by_time(counts: Counter[Expert], load: Load, costs: Costs, visits: int, vram_slots: int, ram_slots: int) -> Placement:
    """Each layer's most frequent experts into VRAM, as many as make the sum of the layers' times the smallest; of the others
    the most frequent into RAM. visits: experts that a token chooses in a layer."""
    layers = [_ranked(((layer, number) for number in range(load.experts)), counts) for layer in range(load.layers)]
    kept = share_out([expected(layer, counts, costs, visits) for layer in layers], vram_slots)
    vram = {expert for layer, count in zip(layers, kept, strict=True) for expert in layer[:count]}
    others = _ranked((expert for layer in layers for expert in layer if expert not in vram), counts)
    return Placement(vram, set(others[:ram_slots]))


def _ranked(experts: Iterable[Expert], counts: Counter[Expert]) -> list[Expert]:
    return sorted(experts, key=lambda expert: (-counts[expert], expert))


def expected(ranked: Sequence[Expert], counts: Counter[Expert], costs: Costs, visits: int) -> list[float]:
    """Seconds that one layer is expected to take with its first 0, 1, ... all experts in VRAM and the others in RAM, were each
    of a token's choices drawn alone. An expert that was never seen counts half a choice."""
    weights = [counts[expert] + 0.5 for expert in ranked]
    whole, reached = sum(weights), [0.0, *accumulate(weights)]
    times = [costs.layer(visits - missed, missed, 0, whole=False) for missed in range(visits + 1)]
    return [*(sum(chance * time for chance, time in zip(_missed(1 - mass / whole, visits), times, strict=True))
              for mass in reached[:-1]), costs.layer(visits, 0, 0, whole=True)]


def _missed(chance: float, visits: int) -> list[float]:
    """Probabilities of 0 .. visits misses."""
    return [math.comb(visits, missed) * chance**missed * (1 - chance)**(visits - missed) for missed in range(visits + 1)]


def share_out(seconds: Sequence[Sequence[float]], slots: int) -> list[int]:
    """How many slots each layer gets so that the sum of seconds[layer][slots] is as small as can be, up to one layer's step.

    A layer's gain may lie at the far end of many slots that gain nothing alone, so what is dealt, the steepest first, are the
    edges of the convex hull under its times; where an edge is longer than what is left, its layer gets the rest if that gains.
    """
    edges = sorted((edge for layer, times in enumerate(seconds) for edge in _hull(layer, times)), key=lambda edge: edge[0])
    given = [0] * len(seconds)
    for slope, layer, start, end in edges:
        if slope < 0 and given[layer] == start and end - start <= slots:
            given[layer], slots = end, slots - (end - start)
    while slots:
        steps = [(times[count] - times[have], count - have, layer) for layer, (times, have) in
                 enumerate(zip(seconds, given, strict=True)) if (count := min(have + slots, len(times) - 1)) > have]
        if not steps or min(steps)[0] >= 0:
            return given
        _, more, layer = min(steps)
        given[layer], slots = given[layer] + more, slots - more
    return given


def _hull(layer: int, times: Sequence[float]) -> list[tuple[float, int, int, int]]:
    """Edges of the lower convex hull: seconds for a slot, the layer, from how many slots to how many."""
    corners: list[int] = []
    for count in range(len(times)):
        while len(corners) > 1 and _slope(times, corners[-2], corners[-1]) >= _slope(times, corners[-1], count):
            corners.pop()
        corners.append(count)
    return [(_slope(times, start, end), layer, start, end) for start, end in pairwise(corners)]


def _slope(times: Sequence[float], start: int, end: int) -> float:
    return (times[end] - times[start]) / (end - start)


def token_seconds(token: Token, placement: Placement, load: Load, costs: Costs) -> float:
    """Seconds of one token, layer after layer."""
    total = costs.token
    for layer, chosen in enumerate(token):
        hits = sum((layer, number) in placement.vram for number in chosen)
        near = sum((layer, number) in placement.ram for number in chosen)
        total += costs.layer(hits, near, len(chosen) - hits - near, placement.kept[layer] == load.experts)
    return total


class Learner:
    """Counts what is chosen and keeps a placement up to date: a copy has to pay within `horizon` tokens.

    `seen` is how many tokens `counts` come from. Counts halve whenever they come from more than MEMORY horizons. across: an
    expert in VRAM may give way to one of another layer; without, layers keep the shares that `by_time` dealt them.
    """

    def __init__(self, placement: Placement, counts: Counter[Expert], seen: float, load: Load, rates: Rates,
                 horizon: int, across: bool = True) -> None:
        self.placement, self.load, self.rates, self.horizon, self.across = placement, load, rates, horizon, across
        self.counts, self.seen = Counter(counts), seen
        self.tokens = 0

    def observe(self, token: Token) -> float:
        """Counts a token's experts; at the end of a horizon, exchanges. Returns the seconds spent on copies."""
        return self.observe_all(Counter(uses_of([token])), 1)

    def observe_all(self, chosen: Counter[Expert], tokens: int) -> float:
        """The same for several tokens, of which `chosen` says how often each expert was chosen."""
        self.counts.update(chosen)
        left = self.horizon - self.tokens % self.horizon
        self.tokens, self.seen = self.tokens + tokens, self.seen + tokens
        if tokens < left:
            return 0.0
        spent = self.exchange()
        if self.seen > MEMORY * self.horizon:
            self.seen /= 2
            for expert in self.counts:
                self.counts[expert] //= 2
        return spent

    def exchange(self) -> float:
        """Swaps over both borders, RAM and disk first, while a swap gains time. Returns the seconds of the copies."""
        size, rates, here = self.load.expert_bytes, self.rates, self.placement
        disk = set(self.counts) - here.vram - here.ram
        spent = self._swap(here.ram, disk, size / rates.disk - size / rates.ram, size / rates.disk)
        if not here.vram:
            return spent
        saved, copy = size / rates.ram - size / rates.vram, size / rates.link
        for own in [lambda expert: True] if self.across else [partial(_is_of, layer) for layer in range(self.load.layers)]:
            upper, lower = set(filter(own, here.vram)), set(filter(own, here.ram))
            before = set(upper)
            spent += self._swap(upper, lower, saved, copy)
            here.vram ^= before ^ upper
            here.ram ^= before ^ upper
        here.count()
        return spent

    def _swap(self, upper: set[Expert], lower: set[Expert], saved: float, copy: float) -> float:
        """Between two tiers: the coldest above for the hottest below; `saved` seconds by a choice, `copy` by a swap."""
        cold = sorted(upper, key=lambda expert: (self.counts[expert], expert))
        spent = 0.0
        for out, into in zip(cold, _ranked(lower, self.counts), strict=False):
            often, seldom = self.counts[into], self.counts[out]
            # of thousands of experts some always look hot by chance: a standard deviation of the difference is not believed
            more = (often - seldom - math.sqrt(often + seldom)) * self.horizon / max(self.seen, 1)
            if more * saved <= copy:
                break
            upper ^= {out, into}
            lower ^= {out, into}
            spent += copy
        return spent


def _is_of(layer: int, expert: Expert) -> bool:
    return expert[0] == layer


def fewest_misses(uses: Sequence[Expert], slots: int) -> int:
    """Misses of who knows the future (Belady, who may also not keep what was read), starting with empty slots."""
    following, last = [len(uses)] * len(uses), dict[Expert, int]()
    for place in range(len(uses) - 1, -1, -1):
        following[place] = last.get(uses[place], len(uses))
        last[uses[place]] = place
    kept, farthest, misses = dict[Expert, int](), list[tuple[int, Expert]](), 0
    for expert, later in zip(uses, following, strict=True):
        misses += expert not in kept
        kept[expert] = later
        heapq.heappush(farthest, (-later, expert))
        while len(kept) > slots:
            when, leaving = heapq.heappop(farthest)
            if kept.get(leaving) == -when:
                del kept[leaving]
    return misses


def uses_of(tokens: Iterable[Token]) -> list[Expert]:
    """Every choice of a trace, in order."""
    return [(layer, number) for token in tokens for layer, chosen in enumerate(token) for number in chosen]
