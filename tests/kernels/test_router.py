from __future__ import annotations

import math

import pytest
import torch

from dsv4_kernels.router import route_by_hash, route_learned


def score(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(logit)))


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """Expert 3 has the least score; the bias lifts it over all, but its weight is its own score's."""
    gate = torch.tensor([[2.0], [1.0], [0.5], [-3.0]])
    weights, experts = route_learned(torch.ones(1, 1), gate, torch.tensor([0.0, 0, 0, 10]), 2, 1.5)
    by_expert = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    total = score(2.0) + score(-3.0)
    assert by_expert == pytest.approx({0: 1.5 * score(2.0) / total, 3: 1.5 * score(-3.0) / total}, rel=1e-6)


def test_weights_sum_to_the_scale(random: torch.Generator) -> None:
    x, gate = torch.randn(50, 8, generator=random), torch.randn(16, 8, generator=random)
    weights, experts = route_learned(x, gate, torch.zeros(16), 6, 2.5)
    assert weights.shape == experts.shape == (50, 6)
    assert torch.allclose(weights.sum(-1), torch.full((50,), 2.5))
    assert all(len(set(row)) == 6 for row in experts.tolist())


def test_hash_routing_takes_experts_from_the_table_and_weights_from_the_gate() -> None:
    gate = torch.tensor([[1.0], [2.0], [-1.0]])
    table = torch.tensor([[0, 1], [2, 0]])
    weights, experts = route_by_hash(torch.ones(2, 1), gate, table, torch.tensor([1, 0]), 1.5)
    assert experts.tolist() == [[2, 0], [0, 1]]
    total = score(-1.0) + score(1.0)
    assert weights[0].tolist() == pytest.approx([1.5 * score(-1.0) / total, 1.5 * score(1.0) / total], rel=1e-6)


def test_doors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="5 of 4 experts"):
        route_learned(torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(4), 5, 1.0)
    with pytest.raises(ValueError, match=r"router bias has shape \[3\], but \[4\]"):
        route_learned(torch.zeros(1, 2), torch.zeros(4, 2), torch.zeros(3), 2, 1.0)
    with pytest.raises(ValueError, match=r"ids has shape \[2\], but \[1\]"):
        route_by_hash(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([[0, 1]]), torch.tensor([0, 0]), 1.0)
