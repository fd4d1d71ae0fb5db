from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.moe import Expert, Experts, ref, routed_experts, shared_expert
from dsv4_quant.formats import FORMATS
from tests.kernels.interpreter import QUIET, of
from tests.kernels.test_linear_native import made
from tests.support.tolerance import RELATIVE, assert_close

pytestmark = QUIET

gpu = of("moe")
LIMIT = 0.7  # low enough to clamp some of these gates
D, WIDTH = 64, 96
SOME = ["mxfp4", "fp4", "q8_0", "q4_k", "q2_k", "iq2_xxs", "f32"]
ROUNDED = 2 * RELATIVE[torch.bfloat16]  # two products, one behind the other, on tensor cores


def bank(name: str, count: int, random: torch.Generator, d: int = D, width: int = WIDTH, down: str = "") -> Experts:
    return Experts(Expert(made(name, width, d, random), made(name, width, d, random), made(down or name, d, width, random))
                   for _ in range(count))


def draw(tokens: int, k: int, count: int, random: torch.Generator, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(count, generator=random)[:k] for _ in range(tokens)])
    return 0.1 * torch.randn(tokens, d, generator=random), torch.rand(tokens, k, generator=random), chosen


def small(name: str, count: int, random: torch.Generator) -> Experts:
    """Experts of few columns, for the interpreter is slow: blocks of 256 in the gate alone."""
    return bank(name, count, random, 96, 64) if FORMATS[name].block < 256 else bank(name, count, random, 256, 32, "q8_0")


def expected(x: Tensor, shares: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    return ref.routed_experts(x.double(), shares.double(), chosen, experts, LIMIT).float()


@pytest.mark.parametrize("name", SOME)
def test_few_tokens_equal_the_reference(name: str, random: torch.Generator) -> None:
    assert pick("moe").name == "gpu"
    experts = small(name, 5, random)
    x, shares, chosen = draw(2, 2, 5, random, experts[0].w1.shape[1])
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts), 5e-6)


@pytest.mark.parametrize("name", SOME)
def test_many_tokens_equal_the_reference(name: str, random: torch.Generator) -> None:
    experts = small(name, 5, random)
    x, shares, chosen = draw(11, 2, 4, random, experts[0].w1.shape[1])  # nobody chooses the last one
    chosen[:, 0] = 2  # and all the third, a tile's worth and more
    chosen[:, 1] = torch.tensor([0, 1, 3, 2])[torch.arange(11) % 4]
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert_close(found, expected(x, shares, chosen, experts), 5e-6 if name == "f32" else ROUNDED)


@pytest.mark.parametrize("tokens", [2, 12])
def test_exact_weights_round_nothing(tokens: int, random: torch.Generator) -> None:
    experts = Experts(Expert(*(replace(part, exact=True) for part in expert)) for expert in bank("q8_0", 4, random, 64, 96))
    x, shares, chosen = draw(tokens, 2, 4, random, 64)
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts), 5e-6)


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("pair", [("q8_0", "q2_k"), ("q8_0", "q4_k"), ("bf16", "iq2_xxs"), ("fp4", "f32")])
def test_gate_and_down_may_differ(tokens: int, pair: tuple[str, str], random: torch.Generator) -> None:
    experts = bank(pair[0], 2, random, d=32, width=256, down=pair[1])
    x, shares, chosen = draw(tokens, 1, 2, random, 32)
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts),
                 5e-6 if tokens == 1 else ROUNDED)


@pytest.mark.parametrize("tokens", [3, 11])
@pytest.mark.parametrize(("width", "d"), [(32, 32), (96, 160), (1056, 32)])
def test_sizes_that_end_within_a_tile(tokens: int, width: int, d: int, random: torch.Generator) -> None:
    experts = bank("q8_0", 3, random, d=d, width=width)
    x, shares, chosen = draw(tokens, 2, 3, random, d=d)
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts),
                 5e-6 if tokens == 3 else ROUNDED)


@pytest.mark.parametrize("tokens", [4, 50])
def test_one_expert_may_take_all_and_others_none(tokens: int, random: torch.Generator) -> None:
    experts = bank("mxfp4", 6, random, 64, 64)
    x, shares, _ = draw(tokens, 1, 6, random, 64)
    chosen = torch.full((tokens, 1), 4)
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert_close(found, expected(x, shares, chosen, experts), 5e-6 if tokens == 4 else ROUNDED)


@pytest.mark.parametrize("tokens", [2, 9])
def test_the_same_expert_twice_counts_twice(tokens: int, random: torch.Generator) -> None:
    """As a hash table may say it."""
    experts = bank("f32", 3, random, 32, 32)
    x, _, _ = draw(tokens, 1, 3, random, 32)
    both = routed_experts(x, torch.full((tokens, 2), 0.5), torch.full((tokens, 2), 1), experts, LIMIT)
    assert_close(both, routed_experts(x, torch.ones(tokens, 1), torch.full((tokens, 1), 1), experts, LIMIT))


@pytest.mark.parametrize("tokens", [2, 9])
def test_sums_go_onto_what_is_there(tokens: int, random: torch.Generator) -> None:
    experts = bank("q8_0", 3, random, 32, 64)
    x, shares, chosen = draw(tokens, 2, 3, random, 32)
    onto = torch.randn(tokens, 32, generator=random)
    before = onto.clone()
    alone = routed_experts(x, shares, chosen, experts, LIMIT)
    assert routed_experts(x, shares, chosen, experts, LIMIT, onto) is onto
    assert_close(onto, before + alone)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_shared_expert_weighs_one(tokens: int, random: torch.Generator) -> None:
    expert = bank("q8_0", 1, random, 96, 64)[0]
    x, _, _ = draw(tokens, 1, 1, random, 96)
    assert_close(shared_expert(x, expert, LIMIT), ref.shared_expert(x.double(), expert, LIMIT).float(),
                 5e-6 if tokens == 1 else ROUNDED)


def test_stacked_experts_are_found_where_they_lie(random: torch.Generator) -> None:
    """As slices of one tensor, in any order, at offsets that are no multiple of 16 bytes."""
    stacked = [made("q8_0", 3 * 32, 32, random) for _ in range(3)]
    cut = [[replace(part, shape=(32, 32), data=part.data[32 * i:32 * (i + 1)]) for part in stacked] for i in (2, 0, 1)]
    experts = Experts(Expert(*parts) for parts in cut)
    x, shares, chosen = draw(5, 2, 3, random, 32)
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts), 5e-6)


@pytest.mark.parametrize("most", [1, 4, 16])
def test_every_pair_gets_a_place_in_a_tile_of_its_expert(most: int, random: torch.Generator) -> None:
    for chosen in (torch.randint(0, 7, (13, 3), generator=random), torch.full((13, 3), 6), torch.tensor([[0]])):
        order, ends, owners, starts = gpu.sorted_by_expert(chosen, 7, most)
        seen = []
        for owner, start in zip(owners.tolist(), starts.tolist(), strict=True):
            if owner < 7:
                pairs = order[start:min(start + most, int(ends[owner]))]
                assert len(pairs)
                assert (chosen.flatten()[pairs] == owner).all()
                seen += pairs.tolist()
        assert sorted(seen) == list(range(chosen.numel()))


def test_experts_that_do_not_match_go_the_way_of_the_reference(random: torch.Generator) -> None:
    mixed = Experts([*bank("q8_0", 1, random), *bank("f32", 1, random)])
    x, shares, chosen = draw(3, 2, 2, random)
    assert torch.equal(routed_experts(x, shares, chosen, mixed, LIMIT), ref.routed_experts(x, shares, chosen, mixed, LIMIT))


@pytest.mark.parametrize("tokens", [4, 12])
def test_no_number_stays_no_number(tokens: int, random: torch.Generator) -> None:
    experts = bank("q8_0", 3, random, 64, 64)
    x, shares, chosen = draw(tokens, 2, 3, random, 64)
    x[2, 5] = float("nan")
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert found[2].isnan().all()
    assert found[[0, 1, *range(3, tokens)]].isfinite().all()
