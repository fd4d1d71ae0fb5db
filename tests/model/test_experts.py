"""Experts over tiers: a card of limited size, which here is the CPU's memory, computes what one of unlimited size does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc, backends
from dsv4_kernels.moe import Expert, Experts, routed_experts, shared_expert
from dsv4_quant.formats import Packed
from dsv4cli.model import slots, transformer
from dsv4cli.model.experts import BESIDE, Place, TieredExperts, picked
from dsv4cli.model.slots import Card, Room, slot_bytes
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound
from tests.support.synth import Shape
from tests.support.tolerance import CHUNKS, assert_close

LAYERS, EXPERTS = len(Shape().ratios), Shape().experts
SIZES = [70, BESIDE, 3, 1, 1, 1]  # experts pass through a card, or are computed beside it; groups of 4 become full


def room(count: int) -> Room:
    return Room("cpu", 0, LAYERS, count)


def some(seed: int, count: int = LAYERS * EXPERTS) -> list[Place]:
    everyone = [(layer, number) for layer in range(LAYERS) for number in range(EXPERTS)]
    return random.Random(seed).sample(everyone, count)


def walked(model: Model, ids: Tensor, sizes: Sequence[int] = SIZES) -> Tensor:
    state = model.new_state(sum(sizes))
    return torch.cat([model.forward(chunk, state, logits="all") for chunk in ids[:sum(sizes)].split(list(sizes))])


def tiered(model: Model) -> TieredExperts:
    assert model.tiers is not None
    return model.tiers


@pytest.mark.parametrize("count", [0, 1, 17, LAYERS * EXPERTS - 1, LAYERS * EXPERTS])
def test_any_placement_computes_the_same(count: int, bound: Bound, ids: Tensor) -> None:
    expected = walked(bound(expand_limit=0), ids)
    model = bound(expand_limit=0, rooms=[room(count)], wanted=some(count))
    assert tiered(model).resident == [set(some(count)[:count])]
    made = walked(model, ids)
    assert_close(made, expected, CHUNKS)
    assert torch.equal(made, walked(model, ids)), "sums have no fixed order"


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_two_cards_have_layers_each_and_streams_move_between_them(numerics: str, bound: Bound, ids: Tensor,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = [Room("cpu", 0, 2, 9), Room("cpu", 2, LAYERS, 11)]
    model = bound(numerics=numerics, expand_limit=0, rooms=rooms, wanted=some(2))
    one, other = tiered(model).resident
    assert one == set([place for place in some(2) if place[0] < 2][:9])
    assert other == set([place for place in some(2) if place[0] >= 2][:11])
    expected = walked(model, ids)
    # A name of the CPU that no tensor bears: to it everything is moved, as to another card. Between cards nothing is queued.
    monkeypatch.setattr(backends, "queued", nullcontext)
    far, near = torch.device("cpu", 1), model.device
    monkeypatch.setattr(model, "devices", [near, near, far, far, far])
    monkeypatch.setattr(model, "ropes", {near: model.ropes[near], far: model.ropes[near]})
    crossed: list[int] = []
    real = transformer.moved
    monkeypatch.setattr(transformer, "moved", lambda given, device: crossed.append(len(given.streams)) or real(given, device))
    assert torch.equal(walked(model, ids), expected)
    assert crossed == [size for size in SIZES for _ in range(3)]
    if numerics == "plain":
        assert_close(expected, walked(bound(expand_limit=0), ids), CHUNKS)


def test_official_numerics_and_every_placement_of_a_layer(bound: Bound, ids: Tensor) -> None:
    """One layer's experts, so that no rounding of a later layer hides or enlarges a difference."""
    experts = bound(numerics="official", expand_limit=0).weights.layers[1].moe
    for tokens in (1, 5, 3 * BESIDE):
        x = torch.randn(tokens, Shape().hidden, generator=torch.Generator().manual_seed(tokens))
        shares = torch.rand(tokens, 2)
        chosen = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
        expected = routed_experts(x, shares, chosen, experts.experts, 10., onto=shared_expert(x, experts.shared, 10.))
        for held in ((), (0,), (1, 4, 5), range(7)):
            tiers = TieredExperts([experts.experts], [Room("cpu", 0, 1, len(held))], 2, [(0, number) for number in held])
            assert_close(tiers.layers[0]._of_several(x, shares, chosen, experts.shared, 10.), expected)
            assert torch.equal(tiers.layers[0].seen[0], chosen)


def test_exchanges_between_tokens_change_no_logits(bound: Bound, ids: Tensor) -> None:
    expected = walked(bound(expand_limit=0), ids, [20, *[1] * 12])
    model = bound(expand_limit=0, rooms=[room(15)], wanted=some(0))
    state, made, tiers = model.new_state(32), [], tiered(model)
    for step, chunk in enumerate(ids[:32].split([20, *[1] * 12])):
        made.append(model.forward(chunk, state, logits="all"))
        here = tiers.resident[0]
        coming = [place for place in some(step) if place not in here][:4]
        tiers.replace(sorted(here)[:4], coming)
        assert tiers.resident == [here - set(sorted(here)[:4]) | set(coming)]
        assert sorted(slot for layer in tiers.layers for slot in layer.slots.values()) == list(range(15))
    assert_close(torch.cat(made), expected, CHUNKS)


def test_the_card_computes_from_its_slots_and_the_cpu_the_others_from_the_file(bound: Bound, ids: Tensor) -> None:
    """Nobody computes an expert twice, and the copies are what is computed with."""
    model = bound(expand_limit=0, rooms=[room(20)], wanted=some(3))
    files = {id(layer.moe.experts): number for number, layer in enumerate(model.weights.layers)}
    met: list[tuple[bool, int]] = []  # from the file; how many choices

    def watch(door: str, given: tuple[Any, ...]) -> None:
        if door == "routed_experts":
            met.append((id(given[3]) in files, given[2].numel()))  # chosen
        elif door == "held_experts":
            met.append((False, int((given[4].places[given[2]] >= 0).sum())))
        elif door == "other_experts":
            met.append((id(given[1]) in files, int((given[2].places[given[0].experts] < 0).sum())))

    with backends.watched(watch):
        state = model.new_state(20)
        model.forward(ids[:19], state)
        met.clear()
        model.forward(ids[19:20], state)
    assert {*files.values()} == {*range(LAYERS)}
    assert sum(count for _, count in met) == LAYERS * Shape().chosen
    here, = tiered(model).resident
    hits = sum((number, expert) in here for number, layer in enumerate(tiered(model).layers)
               for expert in layer.seen[0][0].tolist())
    assert 0 < hits < LAYERS * Shape().chosen
    assert sum(count for from_file, count in met if not from_file) == hits


def test_prompts_bring_experts_along_and_leave_slots_alone(bound: Bound, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bound(expand_limit=0, rooms=[room(20)], wanted=some(3))
    brought: list[int] = []
    bring = Card.bring
    monkeypatch.setattr(Card, "bring", lambda self, experts: brought.append(len(experts)) or bring(self, experts))
    walked(model, ids, [BESIDE])
    assert brought == []
    walked(model, ids, [100])
    assert (sum(brought), max(brought)) == (LAYERS * EXPERTS - 20, Shape().chosen)
    assert tiered(model).resident == [set(some(3)[:20])]


@pytest.mark.parametrize("count", [None, 17])
def test_experts_that_a_tokens_id_names_are_asked_for_before_its_first_layer(count: int | None, bound: Bound,
                                                                             ids: Tensor) -> None:
    model = bound(expand_limit=0, rooms=[] if count is None else [room(count)], wanted=some(4))
    held = model.tiers.layers[0].slots if model.tiers else {}
    moe = model.weights.layers[0].moe
    met: list[tuple[str, tuple[object, ...]]] = []
    expected = walked(model, ids, [5, 1])[-1]
    backends.ask_ahead(1 << 20)
    try:
        assert torch.equal(walked(model, ids, [5, 1])[-1], expected)  # asking for real changes nothing
        with backends.watched(lambda door, given: met.append((door, given))):
            state = model.new_state(6)
            model.forward(ids[:5], state)
            assert "ask_for" not in dict(met)  # prompts need nearly all
            met.clear()
            model.forward(ids[5:6], state)
    finally:
        backends.ask_ahead(0)
    asked = [given for door, given in met if door == "ask_for"]
    assert moe.table is not None
    assert [experts is moe.experts for experts, _ in asked] == [True]  # one layer is routed by token id
    assert asked[0][1] == [number for number in moe.table[ids[5]].tolist() if number not in held]
    doors = [door for door, _ in met]
    assert doors.index("ask_for") < doors.index("mix_streams")
    met.clear()
    with backends.watched(lambda door, given: met.append((door, given))):
        walked(model, ids, [1])
    assert "ask_for" not in dict(met)  # all of it is in memory


def test_a_card_with_less_memory_than_it_said_has_fewer_slots(bound: Bound, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [0], alloc.empty

    def refusing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        if dtype == torch.uint8 and len(shape) == 2:
            made[0] += shape[0]
            if made[0] > 14 + 2 * Shape().chosen:
                raise torch.OutOfMemoryError("The card is full.")
        return real(shape, dtype, device)

    with monkeypatch.context() as patch:
        patch.setattr(slots.alloc, "empty", refusing)
        model = bound(expand_limit=0, rooms=[room(32)], wanted=some(1))
    assert (len(tiered(model).resident[0]), tiered(model).lacking) == (12, 20)  # of eight pieces three
    assert_close(walked(model, ids), walked(bound(expand_limit=0), ids), CHUNKS)


def test_cards_with_slots_for_everyone_have_no_buffers_until_they_lose_some(bound: Bound, ids: Tensor,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = slots._Half.__init__
    monkeypatch.setattr(slots._Half, "__init__", lambda self, *given: made.append(1) or real(self, *given))
    model = bound(expand_limit=0, rooms=[Room("cpu", 0, 2, 2 * EXPERTS), Room("cpu", 2, LAYERS, (LAYERS - 2) * EXPERTS)])
    expected = walked(bound(expand_limit=0), ids)
    assert_close(walked(model, ids), expected, CHUNKS)
    assert made == []
    assert tiered(model).shrink() == 2 + 3
    assert_close(walked(model, ids), expected, CHUNKS)
    assert len(made) == 4


def test_slots_are_given_back_and_the_dearest_experts_stay(bound: Bound, ids: Tensor) -> None:
    model = bound(expand_limit=0, rooms=[room(32)], wanted=some(1))
    tiers, order = tiered(model), some(1)
    keep = order[:32][::-1]  # what is in the piece that goes first
    assert tiers.shrink(keep) == 4
    assert tiers.resident == [set(keep[:28])]
    assert_close(walked(model, ids), walked(bound(expand_limit=0), ids), CHUNKS)
    assert [tiers.shrink() for _ in range(8)] == [4] * 7 + [0]
    assert (tiers.resident, tiers.lacking) == ([set()], 32)
    assert_close(walked(model, ids), walked(bound(expand_limit=0), ids), CHUNKS)


def test_slots_take_experts_of_any_format() -> None:
    """Copies are the same bytes, whatever lay in a slot before and however scales are stored."""
    def weight(name: str, rows: int, cols: int, width: int, scale: Tensor | None = None) -> Packed:
        return Packed(name, (rows, cols), torch.randint(0, 256, (rows, width), dtype=torch.uint8), scale)

    scales = torch.randint(0, 256, (3, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    one = Expert(*(weight("fp4", 3, 64, 32, scales) for _ in range(3)))
    other = Expert(*(weight("q4_k", 3, 256, 144) for _ in range(3)))
    card = Card("cpu", 2, max(slot_bytes(one), slot_bytes(other)), 1)
    for experts in ([one, other], [other, one]):
        for copy, expert in zip(card.put(experts, [0, 1]), experts, strict=True):
            for made, meant in zip(copy, expert, strict=True):
                assert isinstance(made, Packed)
                assert (made.format, made.shape, made.data.data_ptr() % 16) == (meant.format, meant.shape, 0)
                assert torch.equal(made.data, meant.data)
                assert (made.scale is None) == (meant.scale is None)
                assert made.scale is None or torch.equal(made.scale.view(torch.uint8), scales.view(torch.uint8))
    assert isinstance(card.bring([one]), Experts)


def test_choices_are_dealt_in_their_order() -> None:
    shares, numbers = torch.tensor([[.1, .2, .3], [.4, .5, .6], [.7, .8, .9]]), torch.tensor([[5, 6, 7], [8, 9, 5], [6, 7, 8]])
    wanted = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    own, chosen = picked(shares, numbers, wanted)
    assert torch.equal(own, torch.tensor([[.2, .3], [.4, 0], [0, 0]]))
    assert chosen.tolist() == [[6, 7], [8, 8], [6, 6]]
    own, chosen = picked(shares[:1], numbers[:1], wanted[:1])
    assert (own.tolist(), chosen.tolist()) == ([shares[0, 1:].tolist()], [[6, 7]])
