"""Where experts lie and what it costs: against numbers worked out by hand, and against trying everything."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import combinations, product

import pytest

from dsv4cli.engine.placement import (
    Expert,
    Learner,
    Load,
    Placement,
    Rates,
    by_counts,
    by_time,
    expected,
    fewest_misses,
    share_out,
    token_seconds,
)
from dsv4cli.engine.rates import Costs

LOAD = Load(layers=2, experts=4, expert_bytes=100, dense_bytes=1000)
COSTS = Costs(dense=1.0, shared=0.0, hit=0.1, near=1.0, far=10.0, lost=0.25, card=True)
RATES = Rates(vram=1000.0, ram=100.0, disk=10.0, link=50.0)


def test_the_most_frequent_go_to_the_fastest_tier() -> None:
    placed = by_counts(Counter({(1, 3): 9, (0, 2): 5, (1, 0): 5, (0, 1): 1}), LOAD, 2, 2)
    assert placed == Placement({(1, 3), (0, 2)}, {(1, 0), (0, 1)})
    assert placed.kept == {0: 1, 1: 1}


def test_the_gpu_computes_while_the_cpu_does() -> None:
    placed = Placement({(0, 0), (0, 1), (1, 0)}, {(0, 2), (1, 1)})
    # layer 0: dense 1, two hits 0.2 beside one of RAM 1.0; layer 1: dense 1, one of RAM 1.0 and one of the disk 10
    assert token_seconds([[0, 1, 2], [1, 2]], placed, LOAD, COSTS) == pytest.approx(1 + 1 + 1 + 11 + 2 * 0.25)


def test_without_a_gpu_everything_is_read_from_memory() -> None:
    cpu = Costs(dense=10.0, shared=0.5, hit=1.0, near=1.0, far=5.0, lost=0.0, token=3.0)
    placed = by_counts(Counter(), LOAD, 0, 7)
    assert token_seconds([[0, 1], [2, 3]], placed, LOAD, cpu) == pytest.approx(2 * 10.5 + 3 + 5 + 3)


def test_only_a_layer_that_is_whole_asks_nobody() -> None:
    asking = Costs(dense=0.0, shared=0.0, hit=0.1, near=1.0, far=10.0, lost=0.0, card=True, read=0.5, join=0.25)
    placed = Placement({(0, number) for number in range(4)} | {(1, 0), (1, 1)}, {(1, 2), (1, 3)})
    assert token_seconds([[0, 1], [0, 1]], placed, LOAD, asking) == pytest.approx(0.2 + 0.5 + 0.25)
    assert token_seconds([[0, 1], [0, 2]], placed, LOAD, asking) == pytest.approx(0.2 + 0.5 + 0.25 + 1.0)


def test_an_expected_time_is_a_mean_over_what_may_be_missed() -> None:
    """Two choices among four experts, of which the first was chosen as often as the others together; 0.5 stands for chance."""
    counts = Counter({(0, 0): 30, (0, 1): 10, (0, 2): 10, (0, 3): 9})
    ranked = [(0, number) for number in range(4)]
    times = expected(ranked, counts, COSTS, visits=2)
    mass = 30.5 / 61
    assert times[0] == pytest.approx(1.25 + 2.0)
    assert times[1] == pytest.approx(1.25 + mass**2 * 0.2 + 2 * mass * (1 - mass) * 1.0 + (1 - mass)**2 * 2.0)
    assert times[4] == pytest.approx(1.25 + 0.2)


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_shared_out_as_well_as_by_trying_all_ways(seed: int) -> None:
    """For times that fall ever less, exactly; where a last step falls again, as in a layer that is then whole, by no more than
    the largest step."""
    rng = random.Random(seed)
    bent = seed % 2 == 1
    seconds = []
    for _ in range(3):
        falls = sorted((rng.random() for _ in range(4)), reverse=True)
        falls = [*falls[:3], falls[3] + 1.5] if bent else falls
        seconds.append([sum(falls[count:]) for count in range(5)])
    slots = rng.randrange(13)

    def total(given: tuple[int, ...] | list[int]) -> float:
        return sum(times[count] for times, count in zip(seconds, given, strict=True))

    best = min(total(given) for given in product(range(5), repeat=3) if sum(given) <= slots)
    given = share_out(seconds, slots)
    assert sum(given) <= slots
    largest = max(times[count] - times[count + 1] for times in seconds for count in range(4))
    assert total(given) == pytest.approx(best) if not bent else total(given) <= best + largest


def test_whole_layers_are_made_where_asking_costs_more_than_a_miss() -> None:
    """Five slots for two layers of four: one whole layer asks nobody, two halves would both be asked."""
    even = Counter({(layer, number): 5 for layer in range(2) for number in range(4)})
    asking = Costs(dense=1.0, shared=0.0, hit=0.1, near=0.2, far=9.0, lost=0.0, card=True, read=5.0, join=0.0)
    placed = by_time(even, LOAD, asking, 2, 5, 3)
    assert sorted(placed.kept.values()) == [1, 4]
    free = by_time(even, LOAD, COSTS, 2, 4, 4)
    assert len(free.vram) == 4
    assert len(free.ram) == 4


@pytest.mark.parametrize(("uses", "moved"), [(4, False), (5, True)])
def test_an_exchange_has_to_pay_for_its_copy(uses: int, moved: bool) -> None:
    """A hit saves 0.9 s and a copy costs 2 s; of n uses in one horizon, n - sqrt(n) are believed to come again."""
    learner = Learner(Placement({(0, 0)}, {(0, 1)}), Counter({(0, 1): uses}), 1, LOAD, RATES, horizon=1)
    assert learner.exchange() == (2.0 if moved else 0.0)
    assert learner.placement == (Placement({(0, 1)}, {(0, 0)}) if moved else Placement({(0, 0)}, {(0, 1)}))


def test_an_expert_gives_way_to_one_of_another_layer_or_only_of_its_own() -> None:
    learner = Learner(Placement({(0, 0), (1, 0)}, {(0, 1), (0, 2)}), Counter({(0, 1): 90, (0, 2): 80}), 1, LOAD, RATES, 1)
    assert learner.exchange() == 4.0
    assert learner.placement == Placement({(0, 1), (0, 2)}, {(0, 0), (1, 0)})
    assert learner.placement.kept == {0: 2}
    placed = Placement({(0, 0), (1, 0)}, {(0, 1), (1, 1)})
    learner = Learner(placed, Counter({(0, 1): 90, (1, 0): 5}), 1, LOAD, RATES, 1, across=False)
    assert learner.exchange() == 2.0
    assert learner.placement == Placement({(0, 1), (1, 0)}, {(0, 0), (1, 1)})
    assert learner.placement.kept == {0: 1, 1: 1}


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
