from __future__ import annotations

import pytest
import torch

from dsv4_kernels.held import Held, Told, held_experts, join_part, route_and_tell
from dsv4_kernels.hyper import spread_streams
from dsv4_kernels.moe import Expert, Experts, routed_experts, shared_expert
from dsv4_kernels.router import Router, route
from tests.kernels.test_residual import D, K, T, drawn, residual_of
from tests.support.tolerance import assert_close

CPU = torch.device("cpu")


def experts_of(count: int, random: torch.Generator) -> Experts:
    return Experts(Expert(drawn(random, 6, D), drawn(random, 6, D), drawn(random, D, 6)) for _ in range(count))


def test_held_and_others_make_the_whole(random: torch.Generator) -> None:
    """What is held, and what is not, add up to all chosen experts and the shared one once."""
    experts, x = experts_of(6, random), drawn(random, T, D)
    shares, chosen = torch.rand(T, K, generator=random, dtype=torch.float64), torch.tensor([[0, 5], [4, 2], [1, 3]])
    held, others = (Held(5, experts[0], CPU) for _ in range(2))
    held.hold({number: experts[number] for number in (1, 2, 3)})
    others.hold({number: experts[number] for number in (0, 4)})
    chosen = chosen.clamp(max=4)
    shared = experts[5]
    whole = shared_expert(x, shared, 1.0) + routed_experts(x, shares, chosen, experts[:5], 1.0)
    parts = [held_experts(x, shares, chosen, shared, each, 1.0) for each in (held, others)]
    assert_close(sum(parts) - shared_expert(x, shared, 1.0), whole)
    others.hold({})
    assert torch.equal(held_experts(x, shares, chosen, shared, others, 1.0), shared_expert(x, shared, 1.0))
    assert torch.equal(held_experts(x, shares, chosen, shared, Held(5, None, CPU), 1.0), shared_expert(x, shared, 1.0))


def test_telling_is_routing(random: torch.Generator) -> None:
    router = Router(drawn(random, 5, D), drawn(random, 5), None, K, 1.5)
    x, ids = drawn(random, T, D), torch.arange(T)
    told = Told(torch.zeros(T, D, dtype=x.dtype), torch.zeros(T, K, dtype=x.dtype), torch.zeros(T, K, dtype=torch.int64))
    made = route_and_tell(x, router, ids, told)
    for part, told_part, meant in zip((x, *made), told, (x, *route(x, router, ids)), strict=True):
        assert torch.equal(part, meant)
        assert torch.equal(told_part, meant)


def test_parts_join(random: torch.Generator) -> None:
    residual, out, part = residual_of(random), drawn(random, T, D), drawn(random, T, D)
    assert_close(join_part(out, part, residual).streams, spread_streams(out + part, *residual[:3]))


@pytest.mark.parametrize("lacking", ["x", "weights", "experts"])
def test_what_does_not_fit_is_refused(lacking: str, random: torch.Generator) -> None:
    router, x = Router(drawn(random, 5, D), drawn(random, 5), None, K, 1.5), drawn(random, T, D)
    told = Told(torch.zeros(T, D), torch.zeros(T, K), torch.zeros(T, K))
    told = told._replace(**{lacking: torch.zeros(T, D + 1)})
    with pytest.raises(ValueError, match=str(D + 1)):
        route_and_tell(x, router, torch.arange(T), told)
    with pytest.raises(ValueError, match=str(D + 1)):
        join_part(drawn(random, T, D), drawn(random, T, D + 1), residual_of(random))
