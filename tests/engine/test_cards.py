"""What cards hold: every byte once, experts in what is left, whole layers where there are several."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4_quant.files.headers import Header, read_header
from dsv4cli.engine.cards import CardShare
from dsv4cli.engine.memory import MemoryPlan, plan_model
from dsv4cli.errors import CapacityError
from dsv4cli.model.sizes import expanded_bytes, layer_state_bytes, state_bytes
from tests.support.synth import Checkpoint, Shape

SHAPE = Shape(ratios=(0, 4, 128, 4, 128, 4, 128), hidden=64, width=64, experts=16)
CONTEXT = 4096


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(Checkpoint(SHAPE, seed=3).write(tmp_path_factory.mktemp("models") / "random"))


@pytest.fixture(scope="module")
def large(small: Header) -> Header:
    """The same header of files that are too large to be expanded."""
    return replace(small, tensors={name: info._replace(nbytes=info.nbytes * 10**5) for name, info in small.tensors.items()})


def plan(header: Header, *cards: int | None, ctx: int | None = CONTEXT, numerics: str = "official") -> MemoryPlan:
    return plan_model(header, "flash", ctx=ctx, numerics=numerics, available=None, program=7, cards=cards)


def trunk(header: Header) -> dict[str, int]:
    return {role: sum(info.nbytes for info in infos) for role, infos in header.by_role().items() if role != "mtp"}


def whole_of(header: Header) -> CardShare:
    (card,) = plan(header, None).cards
    return card


def test_a_card_with_room_takes_every_weight_once(large: Header) -> None:
    made, nbytes = plan(large, None), trunk(large)
    card = whole_of(large)
    assert card.dense == sum(nbytes.values()) - nbytes["routed_expert"]
    assert card.slots == card.experts == 7 * 16
    assert card.slots * card.expert == nbytes["routed_expert"]
    assert (made.weights, made.experts, made.state, made.scratch, made.pinned, card.staging) == (0, 0, 0, 0, 0, 0)
    assert made.on_cards
    assert card.needed == card.whole == sum(card.sizes().values())


def test_caches_are_packed_where_numerics_allow_it(large: Header) -> None:
    config = large.config
    assert whole_of(large).state == state_bytes(config, CONTEXT, "official", packed=True)
    (plain,) = plan(large, None, numerics="plain").cards
    assert plain.state == state_bytes(config, CONTEXT, "plain")
    layers = [layer_state_bytes(config, layer, CONTEXT, "official", packed=True) for layer in range(7)]
    assert sum(layers) == whole_of(large).state
    assert len(set(layers)) == 3  # one size for each ratio


def test_what_is_left_is_slots_and_the_others_stay_behind(large: Header) -> None:
    whole = whole_of(large)
    bare = whole.fixed + 2 * large.config.num_experts_per_tok * whole.expert  # two buffers of a token's experts
    made = plan(large, bare + 10 * whole.expert + whole.expert // 2)
    (card,) = made.cards
    assert (card.slots, card.staging, made.pinned) == (10, bare - whole.fixed, bare - whole.fixed)
    assert 0 <= (card.available or 0) - card.needed < card.expert
    assert card.whole == whole.whole
    assert made.experts == (whole.experts - 10) * whole.expert == made.weights
    assert not made.on_cards
    assert plan(large, whole.whole).on_cards
    assert not plan(large, whole.whole - 1).on_cards


def test_a_card_without_room_for_what_has_to_be_there_is_refused(large: Header) -> None:
    bare = whole_of(large).fixed + 2 * large.config.num_experts_per_tok * whole_of(large).expert
    assert plan(large, bare).runs
    made = plan(large, bare - 1)
    assert (made.runs, made.fits) == (False, False)
    with pytest.raises(CapacityError, match=r"flash needs [\d.]+ GB of the memory of the GPU .*, but only [\d.]+ GB"):
        made.demand_fit("flash")


def test_layers_are_dealt_whole_by_what_cards_have(large: Header) -> None:
    layers = whole_of(large).whole
    one, two = plan(large, layers // 4, layers // 2).cards
    assert (one.first, one.last, two.last) == (0, two.first, 7)
    assert one.last in (2, 3)
    assert one.experts + two.experts == 7 * 16
    assert abs(one.slots / one.experts - two.slots / two.experts) < 0.5
    fixed = sum(card.dense for card in (one, two))
    assert fixed == whole_of(large).dense


def test_a_card_too_small_for_a_layer_gets_none(large: Header) -> None:
    cards = plan(large, 1000, None).cards
    assert [(card.first, card.last) for card in cards] == [(0, 7)]
    assert cards[0].dense == whole_of(large).dense


def test_a_small_model_is_expanded_and_has_no_slots(small: Header) -> None:
    (card,) = plan(small, None).cards
    assert (card.dense, card.experts, card.slots) == (0, 0, 0)
    assert card.expanded == expanded_bytes(small.config, small.tensor_bytes)
    assert plan(small, None).expands
    assert plan(small, None).on_cards


def test_index_scores_grow_with_the_context_up_to_a_tile(large: Header) -> None:
    scores = [plan(large, None, ctx=ctx).cards[0].index_scores for ctx in (1024, 4096, 1 << 20)]
    assert scores == [4 * 512 * 256, 4 * 512 * 1024, 64 << 20]
