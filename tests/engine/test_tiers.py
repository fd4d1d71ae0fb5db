"""A plan by tier: its sums are the plan's, and every routed expert is counted once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv4_quant.files.headers import Header, read_header
from dsv4_quant.recipe import RECIPES
from dsv4cli.console import in_bytes
from dsv4cli.engine import advice, tiers
from dsv4cli.engine.memory import MemoryPlan, plan_model
from dsv4cli.engine.tiers import EXPERTS
from dsv4cli.model import sizes
from tests.support.synth import Checkpoint, Shape

SHAPE = Shape(ratios=(0, 4, 128, 4), hidden=256, width=256, experts=16, stages=1)
GB = 10**9


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(Checkpoint(SHAPE, seed=3).write(tmp_path_factory.mktemp("models") / "random"))


@pytest.fixture(scope="module")
def large(small: Header) -> Header:
    """The same header of files that are too large to be expanded."""
    return replace(small, tensors={name: info._replace(nbytes=info.nbytes * 10**3) for name, info in small.tensors.items()})


def plan(header: Header, available: int | None = None, cards: tuple[int | None, ...] = (), ctx: int = 2048) -> MemoryPlan:
    return plan_model(header, "flash", ctx=ctx, numerics="official", available=available, cards=cards)


def sums(header: Header, made: MemoryPlan) -> dict[str, int]:
    return {tier: sum(parts.values()) for tier, parts in tiers.by_tier(header, made).items()}


def test_without_a_card_all_is_in_memory_but_the_drafter(small: Header, large: Header) -> None:
    for header in (small, large):
        made = plan(header)
        mtp = sum(info.nbytes for info in header.by_role()["mtp"])
        assert sums(header, made) == {"RAM": made.needed, "disk": mtp}
    assert tiers.placed(plan(large)) == (0, 64, 0)
    assert tiers.placed(plan(small)).told() == ""  # expanded with everything else


def test_what_memory_cannot_hold_is_on_the_disk(large: Header) -> None:
    whole = plan(large)
    made = plan(large, whole.needed - whole.experts // 4)
    assert sums(large, made)["RAM"] == made.available
    assert tiers.by_tier(large, made)["disk"][EXPERTS] == whole.experts // 4
    assert tiers.placed(made) == (0, 48, 16)
    assert tiers.placed(made).told() == "48 of 64 in RAM, 16 on the disk"


def test_cards_and_memory_share_the_experts(large: Header) -> None:
    (whole,) = plan(large, cards=(None,)).cards
    buffers = 2 * large.config.num_experts_per_tok * whole.expert
    made = plan(large, 10 * GB, (whole.fixed + buffers + 24 * whole.expert,))
    parts = tiers.by_tier(large, made)
    assert sums(large, made)["GPU"] == made.cards[0].needed
    assert sums(large, made)["RAM"] == made.needed
    assert parts["GPU"][EXPERTS] == 24 * whole.expert
    assert parts["RAM"] == {"program": made.program, "tokenizer": made.vocabulary, EXPERTS: 40 * whole.expert,
                            "pinned buffers": buffers}
    assert tiers.placed(made).told() == "24 of 64 in VRAM, 40 in RAM"


def test_each_of_several_cards_has_a_tier_with_its_layers(large: Header) -> None:
    made = plan(large, cards=(None, None))
    parts = tiers.by_tier(large, made)
    assert [sums(large, made)[f"GPU {number}"] for number in (0, 1)] == [card.needed for card in made.cards]
    assert ("embedding" in parts["GPU 0"], "head" in parts["GPU 0"]) == (True, False)
    assert ("embedding" in parts["GPU 1"], "head" in parts["GPU 1"]) == (False, True)


def test_compressor_state_is_told_apart_from_the_caches_that_grow(large: Header) -> None:
    short, long = (tiers.by_tier(large, plan(large, ctx=ctx))["RAM"] for ctx in (1024, 65536))
    assert short["compressor state"] == long["compressor state"] > 0
    assert long["caches"] > 10 * short["caches"]


def test_a_recipe_that_would_fit_is_named_with_its_size(small: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that does: of the experts' bytes q4 leaves too many, q3 does not."""
    monkeypatch.setattr(sizes, "EXPAND_LIMIT", 0)
    weights, stored = 4 * 16 * 3 * 256 * 256, plan(small).experts
    nbytes = {name: advice.expert_bytes(small, recipe) for name, recipe in RECIPES.items()}
    assert (stored, nbytes["mxfp4"], nbytes["q4"]) == (weights * 17 // 32, weights * 17 // 32, weights * 9 // 16)
    assert nbytes["q3"] == weights * 2 // 3 * 98 // 256 + weights // 3 * 110 // 256
    made = plan(small, plan(small).needed - (stored - nbytes["q3"]))
    trunk = sum(info.nbytes for role, infos in small.by_role().items() if role != "mtp" for info in infos)
    assert advice.smaller(small, made) == (
        f"dsv4 quantize --recipe q3 would make about {in_bytes(trunk - stored + nbytes['q3'])} of it, which fit.")
    assert advice.to_speed_up(small, made)[0].startswith(f"{in_bytes(made.on_disk)} more memory would keep every expert")
    assert "--recipe q2" in advice.smaller(small, replace(made, available=(made.available or 0) - 1))
    assert advice.smaller(small, replace(made, available=0)) == ""


def test_what_a_card_lacks_is_told(large: Header) -> None:
    (whole,) = plan(large, cards=(None,)).cards
    made = plan(large, cards=(whole.fixed // 2,))
    told = advice.to_run(large, made, lambda ctx: plan(large, cards=(whole.fixed // 2,), ctx=ctx))
    assert "of GPU memory are missing" in told
    assert "--device cpu" in told


def test_nothing_is_advised_where_all_fits(large: Header) -> None:
    assert advice.to_speed_up(large, plan(large, 1000 * GB)) == []
