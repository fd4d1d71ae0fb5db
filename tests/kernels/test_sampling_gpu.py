from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsv4_kernels import sampling
from dsv4_kernels.sampling import BANNED, SEEN, Filters, ref
from tests.kernels.interpreter import QUIET, of

pytestmark = QUIET

gpu = of("sampling")

VOCABULARY = 1187  # of two pieces, the second ragged


def drawn(random: torch.Generator, n: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Logits of which some are equal, and marks of every kind."""
    logits = (torch.randn(n, generator=random) * 8).round() / 4
    return logits, torch.randint(0, 4, (n,), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("filters", [
    Filters(), Filters(temperature=0.0), Filters(temperature=0.3, penalty=1.7), Filters(top_k=1), Filters(top_k=5),
    Filters(top_k=40, top_p=0.8), Filters(top_p=0.9, penalty=0.4), Filters(top_p=1e-6), Filters(min_p=0.2),
    Filters(temperature=2.5, top_k=300, top_p=0.97, min_p=0.05), Filters(top_k=VOCABULARY), Filters(min_p=0.999)])
def test_a_card_draws_what_the_cpu_draws(filters: Filters, random: torch.Generator) -> None:
    logits, marks = drawn(random)
    draws = [0, (1 << 53) - 1, *torch.randint(0, 1 << 53, (2,), generator=random).tolist()]
    found = [int(gpu.sample(logits, marks, filters, draw)) for draw in draws]
    assert found == [int(ref.sample(logits, marks, filters, draw)) for draw in draws]
    assert not any(int(marks[token]) & BANNED for token in found)


@pytest.mark.parametrize(("filters", "last"), [(Filters(top_k=1100), 1099), (Filters(top_p=0.75), 899),
                                               (Filters(top_k=1100, top_p=0.5), 549)])
def test_ties_are_cut_by_id_across_pieces(filters: Filters, last: int) -> None:
    """1,200 equal logits in two pieces: whatever is drawn last is the last one kept."""
    logits, marks = torch.full((1200,), -2.5), torch.zeros(1200, dtype=torch.uint8)
    assert gpu.sample(logits, marks, filters, (1 << 53) - 1).tolist() == [last]
    assert ref.sample(logits, marks, filters, (1 << 53) - 1).tolist() == [last]


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [-math.inf] * 3, [math.inf, 0.0, 1.0]])
@pytest.mark.parametrize("filters", [Filters(), Filters(temperature=0.0), Filters(top_p=0.5, top_k=2, min_p=0.1)])
def test_what_is_no_number_is_told(bad: list[float], filters: Filters) -> None:
    marks = torch.tensor([BANNED, 0, SEEN], dtype=torch.uint8) if math.isnan(bad[0]) else torch.zeros(3, dtype=torch.uint8)
    assert gpu.sample(torch.tensor(bad), marks, filters, 5).tolist() == [-1]
    assert ref.sample(torch.tensor(bad), marks, filters, 5).tolist() == [-1]


def test_one_that_may_be_chosen_is_and_none_is_told() -> None:
    logits, marks = torch.tensor([3.0, -1000.0, 5.0]), torch.tensor([BANNED, 0, BANNED], dtype=torch.uint8)
    for filters in (Filters(), Filters(0.0), Filters(top_k=2, top_p=0.1)):
        assert sampling.sample(logits, marks, filters, 1 << 52).tolist() == [1]
        assert sampling.sample(logits, torch.full_like(marks, BANNED), filters, 0).tolist() == [-1]


def test_infinitely_unlikely_tokens_are_never_drawn(random: torch.Generator) -> None:
    logits = torch.full((70,), -math.inf)
    logits[[7, 69]] = 1.0
    marks = torch.zeros(70, dtype=torch.uint8)
    draws = [0, (1 << 52) - 1, 1 << 52, (1 << 53) - 1]
    for filters in (Filters(), Filters(top_k=60, top_p=0.9999)):
        assert [int(gpu.sample(logits, marks, filters, draw)) for draw in draws] == [7, 7, 69, 69]
