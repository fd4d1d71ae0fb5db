from __future__ import annotations

import pytest
import torch

from dsv4_kernels.held import Held, Told, held_experts, join_part, other_experts, ref, route_and_tell
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.moe import cpu as moe
from dsv4_kernels.native.queue import queued
from dsv4_kernels.residual import Residual
from dsv4_kernels.router import Router, route
from tests.kernels.native import kernels  # noqa: F401
from tests.kernels.test_linear_native import made
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")

D, WIDTH, K, COUNT, LIMIT = 64, 32, 3, 6, 1.0
CPU = torch.device("cpu")


def experts_of(name: str, random: torch.Generator) -> Experts:
    return Experts(Expert(made(name, WIDTH, D, random), made(name, WIDTH, D, random), made(name, D, WIDTH, random))
                   for _ in range(COUNT))


def told_of(tokens: int, random: torch.Generator) -> Told:
    chosen = torch.rand(tokens, COUNT, generator=random).argsort(1)[:, :K]
    return Told(torch.randn(tokens, D, generator=random) / 4, torch.rand(tokens, K, generator=random), chosen)


@pytest.mark.parametrize("name", ["f32", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_hosts_share_is_what_is_not_held(name: str, tokens: int, random: torch.Generator) -> None:
    """Whatever was in the part before, and whoever is held meanwhile; f32 has no kernel of the kind."""
    experts, told, part = experts_of(name, random), told_of(tokens, random), torch.full((tokens, D), torch.nan)
    held = Held(COUNT, experts[0], CPU)
    first = told.experts[0].tolist()
    for here in ((), first[:1], first[1:], range(COUNT), first[:2]):
        held.hold({number: experts[number] for number in here})
        other_experts(told, experts, held, LIMIT, part)
        meant = torch.full((tokens, D), torch.nan)
        ref.add_others(moe, told, experts, held, LIMIT, meant)
        if len(here) == COUNT:
            assert not part.any()
        else:
            assert_close(part, meant)
    told.experts.copy_(told.experts.flip(1))  # another token's choice, in the same memory
    told.weights.mul_(2)
    other_experts(told, experts, held, LIMIT, part)
    ref.add_others(moe, told, experts, held, LIMIT, meant)
    assert_close(part, meant)


def test_queued_or_not_the_same(random: torch.Generator) -> None:
    """From the router to the streams, with the CPU's memory as the card's."""
    experts, shared = experts_of("q8_0", random), experts_of("q8_0", random)[0]
    x, ids = torch.randn(1, D, generator=random), torch.zeros(1, dtype=torch.int64)
    residual = Residual(*(torch.randn(shape, generator=random) for shape in ((1, 2, D), (1, 2), (1, 2, 2), (8, 2 * D))))
    router = Router(torch.randn(COUNT, D, generator=random), torch.randn(COUNT, generator=random), None, K, 1.5)
    told, part = told_of(1, random), torch.zeros(1, D)
    chosen = route(x, router, ids)[1][0].tolist()
    held = Held(COUNT, experts[0], CPU)
    held.hold({number: experts[number] for number in chosen[:2]})

    def computed() -> torch.Tensor:
        weights, numbers = route_and_tell(x, router, ids, told)
        out = held_experts(x, weights, numbers, shared, held, LIMIT)
        other_experts(told, experts, held, LIMIT, part)
        return join_part(out, part, residual).streams

    alone = computed()
    with queued(lazily=True):
        beside = computed()
    assert torch.equal(beside, alone)
    assert_close(told.x, x)
