"""Which routed experts lie in VRAM, in RAM or on the disk, and what a token then costs. Nothing here needs torch.

An expert is named by (layer, number). Places are dealt by how often experts were chosen; one that is resident gives way to
another only where the seconds expected to be saved exceed those of the copy, whatever that does to the rate of hits.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Expert = tuple[int, int]  # layer, number
Token = Sequence[Sequence[int]]  # the experts chosen in each layer
MEMORY = 16  # horizons that counts remember


@dataclass(frozen=True)
class Load:
    """Bytes that a model reads: of one expert, and of everything that every token needs in one layer."""

    layers: int
    experts: int
    expert_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Rates:
    """What a machine reaches with our kernels, in bytes a second; `layer_s` is lost once a layer. No vram: CPU only."""

    vram: float
    ram: float
    disk: float
    link: float
    layer_s: float


@dataclass
class Placement:
    """Experts in VRAM and in RAM; all others lie on the disk."""

    vram: set[Expert]
    ram: set[Expert]


def by_counts(counts: Counter[Expert], load: Load, vram_slots: int, ram_slots: int) -> Placement:
    """The most frequent experts into VRAM, the next into RAM. Ties, and experts never seen, go by layer and number."""
    everyone = ((layer, number) for layer in range(load.layers) for number in range(load.experts))
    ranked = sorted(everyone, key=lambda expert: (-counts[expert], expert))
    end = vram_slots + ram_slots
    return Placement(set(ranked[:vram_slots]), set(ranked[vram_slots:end]))


def token_seconds(token: Token, placement: Placement, load: Load, rates: Rates) -> float:
    """Seconds of one token: in each layer what is dense, then VRAM's experts while the CPU computes the others."""
    total = 0.0
    for layer, chosen in enumerate(token):
        hits = sum((layer, number) in placement.vram for number in chosen)
        near = sum((layer, number) in placement.ram for number in chosen)
        far = len(chosen) - hits - near
        beside = load.expert_bytes * (near / rates.ram + far / rates.disk)
        total += _gpu_seconds(hits, load, rates, beside) + rates.layer_s
    return total


def _gpu_seconds(hits: int, load: Load, rates: Rates, beside: float) -> float:
    fast = rates.vram or rates.ram  # without a GPU the dense part is read by the CPU too
    hit_s = hits * load.expert_bytes / fast
    return load.dense_bytes / fast + max(hit_s, beside)


class Learner:
    """Counts what is chosen and keeps a placement up to date: a copy has to pay within `horizon` tokens.

    `seen` is how many tokens `counts` come from. Counts halve whenever they come from more than MEMORY horizons.
    """

    def __init__(self, placement: Placement, counts: Counter[Expert], seen: float, load: Load, rates: Rates,
                 horizon: int) -> None:
        self.placement, self.load, self.rates, self.horizon = placement, load, rates, horizon
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
        if here.vram:
            spent += self._swap(here.vram, here.ram, size / rates.ram - size / rates.vram, size / rates.link)
        return spent

    def _swap(self, upper: set[Expert], lower: set[Expert], saved: float, copy: float) -> float:
        """Between two tiers: the coldest above for the hottest below; `saved` seconds by a choice, `copy` by a swap."""
        cold = sorted(upper, key=lambda expert: (self.counts[expert], expert))
        hot = sorted(lower, key=lambda expert: (-self.counts[expert], expert))
        spent = 0.0
        for out, into in zip(cold, hot, strict=False):
            often, seldom = self.counts[into], self.counts[out]
            # of thousands of experts some always look hot by chance: a standard deviation of the difference is not believed
            more = (often - seldom - math.sqrt(often + seldom)) * self.horizon / max(self.seen, 1)
            if more * saved <= copy:
                break
            upper ^= {out, into}
            lower ^= {out, into}
            spent += copy
        return spent


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
