"""The sampler against distributions worked out by hand, and against its own promises: seed, ranges, bans."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.sampling import ref
from dsv4cli.engine.sampler import filters_of, make_sampler
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import Dsv4Error, UsageError

CHANCES = [0.4, 0.3, 0.15, 0.1, 0.05]


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, whatever the device."""
    chances = ref.chances(scores, filters_of(sampling)).double()
    return chances / chances.sum()


def logits(chances: list[float]) -> Tensor:
    return torch.tensor(chances).log() + 3.0  # any constant: only differences count


@pytest.mark.parametrize(("settings", "weights"), [
    ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
    ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
    ({"temperature": 2.0}, [math.sqrt(p) for p in CHANCES]),
    ({"top_k": 2}, [0.4, 0.3, 0, 0, 0]),
    ({"top_k": 99}, CHANCES),
    ({"top_p": 0.75}, [0.4, 0.3, 0.15, 0, 0]),  # 0.7 does not reach 0.75, the third crosses it and stays
    ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
    ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),  # 0.3 x 0.4 = 0.12
    ({"top_k": 3, "top_p": 0.8}, [0.4, 0.3, 0, 0, 0]),  # after top-k the two likeliest hold 0.82
    ({"top_k": 4, "min_p": 0.5, "temperature": 0.5}, [0.16, 0.09, 0, 0, 0]),
])
def test_filters_renormalise_exactly(settings: dict[str, Any], weights: list[float]) -> None:
    expected = torch.tensor(weights, dtype=torch.float64)
    found = probabilities(logits(CHANCES), Sampling(**settings))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-5, atol=0)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws: 23.5 is the 99.99 % quantile for 4 degrees of freedom. The seed makes it repeat."""
    choose = make_sampler(Sampling(seed=7))
    draws = 20_000
    counts = torch.bincount(torch.tensor([choose(logits(CHANCES), ()) for _ in range(draws)]), minlength=5)
    expected = torch.tensor(CHANCES) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 23.5


def test_the_seed_decides_and_nothing_else_does() -> None:
    def draw(seed: int | None) -> list[int]:
        choose = make_sampler(Sampling(seed=seed))
        return [choose(torch.zeros(1000), ()) for _ in range(20)]

    first = draw(3)
    torch.rand(5)  # the global generator is not ours
    assert draw(3) == first
    assert draw(4) != first
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_greedy_takes_the_first_of_the_largest(temperature: float) -> None:
    assert make_sampler(Sampling(temperature=temperature))(torch.tensor([1.0, 5.0, 5.0, 2.0]), ()) == 1


def test_a_low_temperature_stays_finite() -> None:
    found = probabilities(torch.tensor([-1e30, 80.0, 79.0]), Sampling(temperature=1e-4))
    assert found.tolist() == [0.0, 1.0, 0.0]


def test_where_the_logits_are_changes_no_choice() -> None:
    """The Triton kernels, which a card would run, and torch draw the same tokens from the same seed."""
    pytest.importorskip("triton")
    scores = torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2
    settings = Sampling(seed=5, temperature=0.8, top_p=0.9, repetition_penalty=1.3)

    def written() -> list[int]:
        choose, history = make_sampler(settings, banned=[3, 4]), [7]
        for _ in range(4):
            history.append(choose(scores, history))
        return history

    expected = written()
    with backends.interpreted():
        assert backends.pick("sampling").name == "gpu"
        assert written() == expected


def test_repetition_penalty_moves_both_signs_down_once() -> None:
    scores = torch.tensor([2.0, -2.0, 1.5, -3.0])
    greedy = make_sampler(Sampling(temperature=0, repetition_penalty=2.0))
    assert greedy(scores, ()) == 0
    assert greedy(scores, [0, 0, 0]) == 2  # 2 -> 1, once, however often it was seen
    assert greedy(torch.tensor([-1.0, -1.5]), [0]) == 1  # -1 -> -2
    assert scores.tolist() == [2.0, -2.0, 1.5, -3.0]  # the caller's logits are his


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_are_never_chosen(temperature: float) -> None:
    choose = make_sampler(Sampling(temperature=temperature, seed=1), banned=[1, 3])
    assert {choose(torch.tensor([0.0, 9.0, 0.0, 9.0]), ()) for _ in range(50)} <= {0, 2}


@pytest.mark.parametrize("broken", [[0.0, math.nan], [-math.inf, -math.inf]])
def test_logits_that_are_not_numbers_are_refused(broken: list[float]) -> None:
    with pytest.raises(Dsv4Error, match="not numbers"):
        make_sampler(Sampling())(torch.tensor(broken), ())


@pytest.mark.parametrize(("name", "value", "said"), [
    ("temperature", -0.1, "between 0"), ("temperature", math.nan, "between 0"), ("temperature", 1000.0, "100"),
    ("top_p", 0.0, "above 0"), ("top_p", 1.5, "at most 1"), ("min_p", -0.1, "at least 0"), ("min_p", 1.0, "below 1"),
    ("top_k", -1, "whole number"), ("top_k", 2.5, "whole number"), ("repetition_penalty", 0.0, "from 0.1"),
    ("repetition_penalty", math.inf, "to 10"), ("seed", -1, "whole number"), ("seed", 1 << 63, "2\\*\\*63"),
])
def test_bad_values_name_the_range(name: str, value: float, said: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is .*{said}") as caught:
        Sampling(**{name: value})
    assert caught.value.exit_code == 2
