from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsv4_kernels.linear import ref as linear_ref
from dsv4_kernels.moe import Expert, Experts, ref, routed_experts, shared_expert
from dsv4_kernels.native.weights import FORMATS
from tests.kernels.native import kernels  # noqa: F401
from tests.kernels.test_linear_native import AS_THEY_ARE, made, rounded
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")

LIMIT = 0.7  # low enough to clamp some of these gates
D, WIDTH = 256, 512


def bank(name: str, count: int, random: torch.Generator, d: int = D, width: int = WIDTH, down: str = "") -> Experts:
    return Experts(Expert(made(name, width, d, random), made(name, width, d, random), made(down or name, d, width, random))
                   for _ in range(count))


def met(x: Tensor, name: str) -> Tensor:
    return x.double() if name in AS_THEY_ARE else rounded(x.float())


def expected(x: Tensor, shares: Tensor, chosen: Tensor, experts: Experts, name: str, down: str = "") -> Tensor:
    """The reference's sums, with activations rounded where the kernels round them."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for number, tokens, slots in ref.by_expert(chosen):
        rows, expert = met(x[tokens], name), experts[number]
        gate = linear_ref.linear(rows, expert.w1).clamp(max=LIMIT)
        hidden = functional.silu(gate) * linear_ref.linear(rows, expert.w3).clamp(-LIMIT, LIMIT)
        hidden *= shares[tokens, slots, None].double()
        out.index_add_(0, tokens, linear_ref.linear(met(hidden, down or name), expert.w2))
    return out


def draw(tokens: int, k: int, count: int, random: torch.Generator, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    x = 0.1 * torch.randn(tokens, d, generator=random)
    chosen = torch.stack([torch.randperm(count, generator=random)[:k] for _ in range(tokens)])
    return x, torch.rand(tokens, k, generator=random), chosen


# A hidden value that lies almost between two bytes may go either way, so byte formats are a little coarser.
def tolerance(name: str) -> float:
    return 2e-6 if name in AS_THEY_ARE else 2e-4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 37])
def test_equals_the_reference(name: str, tokens: int, random: torch.Generator) -> None:
    experts = bank(name, 7, random)
    x, shares, chosen = draw(tokens, 3, 7, random)
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert_close(found, expected(x, shares, chosen, experts, name).float(), tolerance(name))


@pytest.mark.parametrize("name", ["q8_0", "mxfp4", "iq2_xxs", "f32"])
def test_a_token_does_not_notice_its_company(name: str, random: torch.Generator) -> None:
    experts = bank(name, 5, random)
    x, shares, chosen = draw(11, 2, 5, random)
    whole = routed_experts(x, shares, chosen, experts, LIMIT)
    alone = [routed_experts(x[i:i + 1], shares[i:i + 1], chosen[i:i + 1], experts, LIMIT) for i in range(len(x))]
    if name in AS_THEY_ARE:
        assert torch.equal(whole, torch.cat(alone))
    else:  # a few tokens' bytes are added up in another order than those of many
        assert_close(whole, torch.cat(alone), tolerance(name))


@pytest.mark.parametrize("tokens", [1, 8])
def test_gate_and_down_may_differ(tokens: int, random: torch.Generator) -> None:
    """IQ2_XXS with Q2_K is the usual pair; FP4 wants its activations in another order than Q8_0."""
    for name, down in (("iq2_xxs", "q2_k"), ("q4_k", "q6_k"), ("fp4", "q8_0"), ("bf16", "q8_0"), ("q8_0", "f32")):
        experts = bank(name, 4, random, down=down)
        x, shares, chosen = draw(tokens, 2, 4, random)
        assert_close(routed_experts(x, shares, chosen, experts, LIMIT),
                     expected(x, shares, chosen, experts, name, down).float(), 2e-4)


@pytest.mark.parametrize(("width", "d"), [(32, 32), (96, 160), (1024, 32)])
def test_narrow_and_wide_experts(width: int, d: int, random: torch.Generator) -> None:
    experts = bank("q8_0", 3, random, d=d, width=width)
    x, shares, chosen = draw(6, 2, 3, random, d=d)
    assert_close(routed_experts(x, shares, chosen, experts, LIMIT), expected(x, shares, chosen, experts, "q8_0").float(),
                 tolerance("q8_0"))


def test_one_expert_may_take_all_and_others_none(random: torch.Generator) -> None:
    experts = bank("mxfp4", 6, random)
    x, shares, _ = draw(50, 1, 6, random)
    chosen = torch.full((50, 1), 4)
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert_close(found, expected(x, shares, chosen, experts, "mxfp4").float(), tolerance("mxfp4"))


def test_the_same_expert_twice_counts_twice(random: torch.Generator) -> None:
    """As a hash table may say it."""
    experts = bank("f32", 3, random)
    x, _, _ = draw(2, 1, 3, random)
    both = routed_experts(x, torch.full((2, 2), 0.5), torch.full((2, 2), 1), experts, LIMIT)
    once = routed_experts(x, torch.ones(2, 1), torch.full((2, 1), 1), experts, LIMIT)
    assert_close(both, once)


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_shared_expert_weighs_one(tokens: int, random: torch.Generator) -> None:
    experts = bank("q8_0", 2, random)
    x, _, _ = draw(tokens, 1, 2, random)
    ones, zeros = torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64)
    assert_close(shared_expert(x, experts[0], LIMIT), expected(x, ones, zeros, experts, "q8_0").float(),
                 tolerance("q8_0"))


def test_experts_that_do_not_match_go_the_way_of_the_reference(random: torch.Generator) -> None:
    mixed = Experts([*bank("q8_0", 1, random), *bank("f32", 1, random)])
    x, shares, chosen = draw(3, 2, 2, random)
    assert torch.equal(routed_experts(x, shares, chosen, mixed, LIMIT),
                       ref.routed_experts(x, shares, chosen, mixed, LIMIT))
    plain = bank("f32", 2, random)
    doubles = routed_experts(x.double(), shares.double(), chosen, plain, LIMIT)
    assert torch.equal(doubles, ref.routed_experts(x.double(), shares.double(), chosen, plain, LIMIT))


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    experts = bank("q8_0", 3, random)
    x, shares, chosen = draw(4, 2, 3, random)
    x[2, 5] = float("nan")
    found = routed_experts(x, shares, chosen, experts, LIMIT)
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()
