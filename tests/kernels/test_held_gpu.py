from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.held import Held, Told, held_experts, join_part, ref, route_and_tell
from dsv4_kernels.hyper import spread_streams
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.router import route
from dsv4cli.model.slots import Card, slot_bytes
from tests.kernels.interpreter import QUIET, of
from tests.kernels.test_residual_gpu import FEW, LIMIT, check, drawn, experts_of, residual_of, router_of

pytestmark = QUIET

gpu = of("held")
CPU = torch.device("cpu")


class Slots:
    """Three experts' worth of a card's memory, in which a layer's experts lie."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.card = Card(CPU, 3, slot_bytes(experts[0]), 2)
        self.held = Held(len(experts), self.card.views(experts[0]), CPU)

    def hold(self, *numbers: int) -> Held:
        """These in slots of falling numbers."""
        places = list(range(len(numbers)))[::-1]
        self.held.hold(dict(zip(numbers, self.card.put([self.experts[number] for number in numbers], places), strict=True)))
        return self.held


def expected(x: Tensor, shares: Tensor, chosen: Tensor, shared: Expert, held: Held) -> Tensor:
    return ref.held_experts(x.double(), shares.double(), chosen, shared, held, LIMIT).float()


@pytest.mark.parametrize(("name", "other", "d", "width", "tokens"), [
    ("mxfp4", "q8_0", 96, 64, 1), ("mxfp4", "q8_0", 96, 64, 2), ("q2_k", "fp8_e4m3", 256, 256, 1)])
def test_what_is_held_is_computed_and_nothing_else(name: str, other: str, d: int, width: int, tokens: int,
                                                   random: torch.Generator) -> None:
    """Also after another hold, with the table where it was: hits, misses and both, whatever lies in the others' slots."""
    slots = Slots(experts_of(name, 5, d, width, random))
    shared = experts_of(other, 1, d, width // 2 if other == "fp8_e4m3" else width, random)[0]
    x, shares = drawn(random, tokens, d), torch.rand(tokens, 2, generator=random)
    tables = set()
    every = name == "mxfp4"  # the others take the interpreter long
    for numbers in ((4, 1, 2), (0, 3), ()) if every else ((4, 1, 2), (0, 3)):
        held = slots.hold(*numbers)
        for chosen in (torch.tensor([[1, 0]]), torch.tensor([[2, 4]])) if every else (torch.tensor([[1, 0]]),):
            given = x, shares, chosen.expand(tokens, 2), shared, held
            assert_close_to(held_experts(*given, LIMIT), expected(*given))
        tables.add(gpu._bank_of(held).offsets.data_ptr())
    assert len(tables) == 1


def assert_close_to(found: Tensor, meant: Tensor) -> None:
    assert found.shape == meant.shape
    assert (found - meant).norm() <= FEW * meant.norm()


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_host_is_told_what_the_router_chose(hashed: bool, tokens: int, random: torch.Generator) -> None:
    d, k = 1100, 3  # a row that ends within a tile
    router, x, ids = router_of(7, d, k, hashed, random), drawn(random, tokens, d), torch.arange(tokens) * 5
    told = Told(torch.full((tokens, d), torch.nan), torch.full((tokens, k), torch.nan), torch.full((tokens, k), -1))
    weights, experts = route_and_tell(x, router, ids, told)
    for made, other, meant in zip((weights, experts), told[1:], route(x, router, ids), strict=True):
        assert torch.equal(made, meant)
        assert torch.equal(other, meant)
    assert torch.equal(told.x, x)


@pytest.mark.parametrize(("s", "d", "tokens"), [(4, 67, 1), (4, 32, 2), (1, 1, 1)])
def test_both_parts_join_the_streams(s: int, d: int, tokens: int, random: torch.Generator) -> None:
    (residual, mixer), out, part = residual_of(tokens, s, d, random), drawn(random, tokens, d), drawn(random, tokens, d)
    meant = spread_streams((out + part).double(), *(each.double() for each in residual[:3]), backend="ref")
    check(join_part(out, part, residual), meant, mixer, FEW, summed=True)


def test_what_has_no_kernel_goes_the_way_of_the_reference(random: torch.Generator) -> None:
    """More tokens than the kernels take; and experts of two formats."""
    slots = Slots(experts_of("q8_0", 4, 64, 32, random))
    shared, x = experts_of("q8_0", 1, 64, 32, random)[0], drawn(random, 9, 64)
    shares, chosen = torch.rand(9, 2, generator=random), torch.rand(9, 4, generator=random).argsort(1)[:, :2]
    held = slots.hold(1, 3)
    assert_close_to(held_experts(x, shares, chosen, shared, held, LIMIT), expected(x, shares, chosen, shared, held))
    other = experts_of("f32", 1, 64, 32, random)[0]
    held.hold({1: held.there[0], 2: other})
    assert gpu._bank_of(held) is None
    assert_close_to(held_experts(x[:1], shares[:1], torch.tensor([[2, 0]]), shared, held, LIMIT),
                    expected(x[:1], shares[:1], torch.tensor([[2, 0]]), shared, held))
