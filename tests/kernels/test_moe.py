from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import pytest
import torch
from torch import Tensor

from dsv4_kernels.moe import Expert, routed_experts, shared_expert
from dsv4_kernels.moe.ref import by_expert
from tests.support.tolerance import assert_close

D, WIDTH, LIMIT = 7, 5, 1.0  # the limit is small enough to bite
WIDE = torch.float64


def drawn(count: int, random: torch.Generator) -> list[Expert]:
    shapes = ((WIDTH, D), (WIDTH, D), (D, WIDTH))
    return [Expert(*(torch.randn(shape, generator=random, dtype=WIDE) for shape in shapes)) for _ in range(count)]


def by_hand(x: Tensor, expert: Expert, weight: float = 1.0) -> Tensor:
    """One token through one expert."""
    w1, w3, w2 = (each for each in expert if isinstance(each, Tensor))
    gate = torch.minimum(w1 @ x, torch.tensor(LIMIT, dtype=WIDE))  # from above only
    up = torch.maximum(torch.minimum(w3 @ x, torch.tensor(LIMIT, dtype=WIDE)), torch.tensor(-LIMIT, dtype=WIDE))
    return w2 @ (weight * (gate / (1 + (-gate).exp()) * up))


class Watched(Sequence[Expert]):
    """Experts that note who was asked for."""

    def __init__(self, experts: list[Expert]) -> None:
        self.experts, self.touched = experts, set[int]()

    @overload
    def __getitem__(self, number: int) -> Expert: ...
    @overload
    def __getitem__(self, number: slice) -> list[Expert]: ...
    def __getitem__(self, number: int | slice) -> Expert | list[Expert]:
        assert isinstance(number, int)
        self.touched.add(number)
        return self.experts[number]

    def __len__(self) -> int:
        return len(self.experts)


# one token; a prime number of them; everyone to the same two experts
@pytest.mark.parametrize(("t", "same"), [(1, False), (13, False), (13, True)])
def test_routed_experts_are_what_the_definition_says(t: int, same: bool, random: torch.Generator) -> None:
    experts = drawn(9, random)
    x, weights = (torch.randn(t, size, generator=random, dtype=WIDE) for size in (D, 2))
    chosen = torch.stack([torch.randperm(9, generator=random)[:2] for _ in range(t)])
    if same:
        chosen[:] = torch.tensor([8, 3])
    expected = torch.zeros_like(x)
    for token in range(t):
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            expected[token] += by_hand(x[token], experts[expert], weight)
    assert_close(routed_experts(x, weights, chosen, experts, LIMIT), expected)


def test_only_chosen_experts_are_touched(random: torch.Generator) -> None:
    watched = Watched(drawn(40, random))
    chosen = torch.tensor([[2, 31], [31, 7]])
    routed_experts(torch.randn(2, D, dtype=WIDE), torch.ones(2, 2, dtype=WIDE), chosen, watched, LIMIT)
    assert watched.touched - {0} == {2, 7, 31}  # the door looks at the shapes of the first


def test_shared_expert_has_no_weight(random: torch.Generator) -> None:
    expert, x = drawn(1, random)[0], torch.randn(4, D, generator=random, dtype=WIDE)
    assert_close(shared_expert(x, expert, LIMIT), torch.stack([by_hand(row, expert) for row in x]))


def test_the_gate_is_not_clamped_from_below() -> None:
    one = torch.ones(1, 1)
    negative = Expert(-one, one, one)  # gate -50: silu is almost -0; clamped at -1 it would be -0.27
    assert shared_expert(50 * one, negative, 1.0).abs() < 1e-15


def test_grouping_is_a_permutation(random: torch.Generator) -> None:
    chosen = torch.randint(0, 6, (17, 3), generator=random)
    seen = []
    for expert, tokens, slots in by_expert(chosen):
        assert (chosen[tokens, slots] == expert).all()
        seen += list(zip(tokens.tolist(), slots.tolist(), strict=True))
    assert sorted(seen) == [(token, slot) for token in range(17) for slot in range(3)]


def test_doors_name_the_numbers(random: torch.Generator) -> None:
    experts = drawn(2, random)
    with pytest.raises(ValueError, match=r"x has shape \[1, 6\], but \[any, 7\]"):
        shared_expert(torch.zeros(1, 6, dtype=WIDE), experts[0], LIMIT)
    with pytest.raises(ValueError, match=r"chosen experts has shape \[1, 3\], but \[1, 2\]"):
        routed_experts(torch.zeros(1, D, dtype=WIDE), torch.zeros(1, 2), torch.tensor([[0, 1, 0]]), experts, LIMIT)
