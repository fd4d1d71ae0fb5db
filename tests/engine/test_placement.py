"""Where experts lie and what it costs: against numbers worked out by hand, and against trying everything."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import combinations

import pytest

from dsv4cli.engine.placement import Expert, Learner, Load, Placement, Rates, by_counts, fewest_misses, token_seconds

LOAD = Load(layers=2, experts=4, expert_bytes=100, dense_bytes=1000)
RATES = Rates(vram=1000.0, ram=100.0, disk=10.0, link=50.0, layer_s=0.25)


def test_the_most_frequent_go_to_the_fastest_tier() -> None:
    placed = by_counts(Counter({(1, 3): 9, (0, 2): 5, (1, 0): 5, (0, 1): 1}), LOAD, 2, 2)
    assert placed == Placement({(1, 3), (0, 2)}, {(1, 0), (0, 1)})


def test_the_gpu_computes_while_the_cpu_does() -> None:
    placed = Placement({(0, 0), (0, 1), (1, 0)}, {(0, 2), (1, 1)})
    # layer 0: dense 1, two hits 0.2 beside one of RAM 1.0; layer 1: dense 1, one of RAM 1.0 and one of the disk 10
    assert token_seconds([[0, 1, 2], [1, 2]], placed, LOAD, RATES) == pytest.approx(1 + 1 + 1 + 11 + 2 * 0.25)


def test_without_a_gpu_everything_is_read_from_memory() -> None:
    cpu = Rates(vram=0.0, ram=100.0, disk=10.0, link=1.0, layer_s=0.0)
    placed = by_counts(Counter(), LOAD, 0, 8)
    assert token_seconds([[0, 1], [2, 3]], placed, LOAD, cpu) == pytest.approx(2 * (10 + 2))


@pytest.mark.parametrize(("uses", "moved"), [(4, False), (5, True)])
def test_an_exchange_has_to_pay_for_its_copy(uses: int, moved: bool) -> None:
    """A hit saves 0.9 s and a copy costs 2 s; of n uses in one horizon, n - sqrt(n) are believed to come again."""
    learner = Learner(Placement({(0, 0)}, {(0, 1)}), Counter({(0, 1): uses}), 1, LOAD, RATES, horizon=1)
    assert learner.exchange() == (2.0 if moved else 0.0)
    assert learner.placement == (Placement({(0, 1)}, {(0, 0)}) if moved else Placement({(0, 0)}, {(0, 1)}))


def test_what_is_hot_climbs_from_the_disk_and_nothing_is_lost() -> None:
    learner = Learner(Placement({(0, 0)}, {(0, 1)}), Counter(), 0, LOAD, RATES, horizon=8)
    assert [learner.observe([[3], []]) for _ in range(8)] == [0.0] * 7 + [10.0 + 2.0]  # read once, copied once
    assert learner.placement == Placement({(0, 3)}, {(0, 0)})


@pytest.mark.parametrize("seed", range(20))
def test_nobody_misses_less_than_who_knows_the_future(seed: int) -> None:
    rng = random.Random(seed)
    uses: list[Expert] = [(0, rng.randrange(5)) for _ in range(12)]
    slots = rng.randrange(4)

    @cache
    def best(place: int, kept: frozenset[Expert]) -> int:
        if place == len(uses):
            return 0
        have = kept | {uses[place]}
        keeps = combinations(sorted(have), min(slots, len(have)))
        return (uses[place] not in kept) + min(best(place + 1, frozenset(keep)) for keep in keeps)

    assert fewest_misses(uses, slots) == best(0, frozenset())


def test_long_histories_promise_no_more_than_they_hold() -> None:
    """The same 100 uses are many in 10 tokens and few in 10,000."""
    for seen, moved in ((10, True), (10_000, False)):
        learner = Learner(Placement({(0, 0)}, {(0, 1)}), Counter({(0, 1): 100}), seen, LOAD, RATES, horizon=10)
        assert (learner.exchange() > 0) == moved
