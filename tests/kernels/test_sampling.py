"""The reference of sampling against the distribution worked out in floats, filter by filter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.sampling import BANNED, SEEN, Filters, ref, sample


def probabilities(scores: Tensor, filters: Filters) -> Tensor:
    """In float64, with a sort for each filter, each of which sees what the one before it renormalised."""
    chances = torch.softmax(scores.double() / filters.temperature, -1)
    index = chances.argsort(descending=True, stable=True)

    def kept(keep: Tensor) -> Tensor:
        left = torch.zeros_like(chances)
        left[index[keep]] = chances[index[keep]]
        return left / left.sum()

    if 0 < filters.top_k < len(scores):
        chances = kept(torch.arange(len(scores)) < filters.top_k)
    if filters.top_p < 1:
        ordered = chances[index]
        chances = kept(ordered.cumsum(0) - ordered < filters.top_p)
    if filters.min_p > 0:
        chances = kept(chances[index] >= filters.min_p * chances.max())
    return chances


@pytest.mark.parametrize("filters", [
    Filters(), Filters(temperature=0.4), Filters(top_k=1), Filters(top_k=17), Filters(top_p=0.9), Filters(top_p=1e-9),
    Filters(min_p=0.1), Filters(temperature=3.0, top_k=50, top_p=0.7, min_p=0.3)])
def test_chances_are_the_distribution(filters: Filters, random: torch.Generator) -> None:
    scores = torch.randn(501, generator=random) * 3
    found, expected = ref.chances(scores, filters).double(), probabilities(scores, filters)
    torch.testing.assert_close(found / found.sum(), expected, rtol=1e-6, atol=1e-12)


def test_a_draw_falls_where_the_chances_say(random: torch.Generator) -> None:
    """As often as they are likely, up to the grid of draws."""
    scores, marks = torch.randn(7, generator=random), torch.zeros(7, dtype=torch.uint8)
    steps = 2000
    found = torch.cat([sample(scores, marks, Filters(), ((2 * step + 1) << 52) // steps) for step in range(steps)])
    counts = torch.bincount(found, minlength=7).double() / steps
    assert (counts - torch.softmax(scores.double(), -1)).abs().max() <= 1 / steps
    assert torch.equal(found, found.sort().values)


def test_penalty_and_bans() -> None:
    logits, marks = torch.tensor([2.0, -2.0, 1.5, 9.0]), torch.tensor([SEEN, SEEN, 0, BANNED], dtype=torch.uint8)
    assert ref.penalised(logits, marks, 2.0).tolist() == [1.0, -4.0, 1.5, -torch.inf]
    assert sample(logits, marks, Filters(temperature=0.0, penalty=2.0)).tolist() == [2]


def test_of_equal_ones_the_first_are_kept() -> None:
    chances = ref.chances(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), Filters(top_k=3))
    assert (chances > 0).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(("n", "draw", "said"), [(3, 0, "marks"), (4, 1 << 53, "below"), (4, -1, "below")])
def test_what_does_not_fit_is_refused(n: int, draw: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample(torch.zeros(4), torch.zeros(n, dtype=torch.uint8), Filters(), draw)
