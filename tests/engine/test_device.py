"""Where a model computes: what auto chooses, and what a card that cannot be used says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4_kernels import backends
from dsv4_quant.files import open_source
from dsv4cli.engine import device, opening
from dsv4cli.engine.cards import CardShare
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.errors import CapacityError, UsageError
from dsv4cli.model.slots import Room
from tests.support.gguf_writer import Kind, write
from tests.support.synth import Checkpoint, Shape

SMALL = MemoryPlan(512, 1, 0, 2, 0, 3, 3, 4, available=100)
SHARE = CardShare(0, 2, available=100, program=1, dense=20, state=3, snapshots=3, scratch=4, index_scores=1, expert=5,
                  experts=8, slots=8)
CARD = replace(SMALL, weights=0, cards=(SHARE,))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that everything says is there; nothing is computed on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "gpu_trouble", lambda: None)
    monkeypatch.setattr(device, "PROVEN", True)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plans(on_card: MemoryPlan) -> dict[str, MemoryPlan]:
    return {"cpu": SMALL, "cuda": on_card}


def settled(asked: str, on_card: MemoryPlan = CARD, formats: Collection[str] = ("q2_k", "f32")) -> device.Place:
    return device.settle("flash", asked, formats, plans(on_card).__getitem__)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("asked", "chosen", "why"), [
    ("auto", "cuda", "fits into the card's memory"), ("cuda", "cuda", "asked for"), ("cpu", "cpu", "asked for")])
def test_a_card_is_taken_unless_the_cpu_is_asked_for(asked: str, chosen: str, why: str) -> None:
    place = settled(asked)
    assert (place.device, place.plan) == (chosen, plans(CARD)[chosen])
    assert why in place.reason


@pytest.mark.usefixtures("card")
def test_until_kernels_are_proven_a_card_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "PROVEN", False)
    assert settled("auto").device == "cpu"
    assert "--device cuda" in settled("auto").reason
    assert settled("cuda").device == "cuda"


@pytest.mark.usefixtures("card")
def test_what_does_not_fit_into_the_card_stays_on_the_cpu_or_is_refused() -> None:
    large = replace(CARD, cards=(replace(SHARE, available=1_000_000_000, dense=400_000_000, expert=200_000_000, slots=2),))
    place = settled("auto", large)
    assert (place.device, place.plan) == ("cpu", SMALL)
    assert "2.0 GB of the card's memory, which has 1.0 GB free" in place.reason
    asked = settled("cuda", large)  # experts that do not fit stay behind
    assert (asked.device, opening.rooms_of(asked)) == ("cuda", (Room("cuda", 0, 2, 2),))
    assert opening.rooms_of(settled("cuda")) == ()
    larger = replace(CARD, cards=(replace(large.cards[0], dense=1_500_000_000, slots=0),))
    with pytest.raises(CapacityError, match=r"needs 1\.5 GB of the memory of the GPU .* only 1\.0 GB"):
        settled("cuda", larger)


@pytest.mark.usefixtures("card")
def test_formats_without_a_kernel_stay_on_the_cpu() -> None:
    place = settled("auto", formats=["q2_k", "iq3_xxs"])
    assert (place.device, "iq3_xxs" in place.reason, "q2_k" in place.reason) == ("cpu", True, False)
    with pytest.raises(UsageError, match="no kernel for iq3_xxs"):
        settled("cuda", formats=["q2_k", "iq3_xxs"])
    decoded = replace(CARD, cards=(replace(SHARE, expanded=5),))  # before it goes there
    assert settled("auto", decoded, ["iq3_xxs"]).device == "cuda"


@pytest.mark.usefixtures("no_card")
def test_without_a_card() -> None:
    assert settled("auto").device == "cpu"
    with pytest.raises(UsageError, match=r"Nothing can run on cuda: .*(no card|without CUDA)") as refused:
        settled("cuda")
    assert "--device cpu" in str(refused.value.hint)


@pytest.mark.usefixtures("card")
def test_cards_and_installations_that_the_kernels_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5" in settled("auto").reason
    monkeypatch.setattr(backends, "gpu_trouble", lambda: backends.BackendError("Triton is not installed.", "Install it."))
    with pytest.raises(UsageError, match=r"on cuda: Triton is not installed\."):
        settled("cuda")


@pytest.mark.usefixtures("no_card")
def test_every_layout_finds_its_place(tmp_path: Path) -> None:
    """A GGUF's formats are read from its header; official checkpoints have those that every kernel knows."""
    source = open_source(Checkpoint(Shape(), seed=5).write(tmp_path / "official"))
    place = opening.place_of(source, "random", 512, "official", "auto")
    assert (place.device, place.plan.context) == ("cpu", 512)
    gguf = open_source(write(source, tmp_path / "model.gguf", Kind.F32))
    assert opening.place_of(gguf, "random", 512, "official", "cpu").reason == "it was asked for"
    with pytest.raises(UsageError, match="Nothing can run on cuda"):
        opening.place_of(gguf, "random", 512, "official", "cuda")


@pytest.mark.usefixtures("card")
def test_a_limit_is_the_most_that_is_used_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: ((20 - 10 * card) * 10**9, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda card: 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.free_on_cards() == [22 * 10**9]
    assert device.free_on_cards([8 * 10**9]) == [8 * 10**9]
    assert device.free_on_cards([23 * 10**9]) == [22 * 10**9]
    with pytest.raises(UsageError, match=r"--vram asks for 25\.0 GB, but the GPU has 24\.0 GB"):
        device.free_on_cards([25 * 10**9])
    assert device.free_on_cards([23 * 10**9, 23 * 10**9]) == [22 * 10**9, 12 * 10**9]
    with pytest.raises(UsageError, match="--vram names 3 GPUs, but there are 2"):
        device.free_on_cards([10**9] * 3)


@pytest.mark.usefixtures("card")
def test_several_cards_have_whole_layers_each() -> None:
    two = replace(CARD, cards=(replace(SHARE, slots=3), replace(SHARE, first=2, last=5, slots=8)))
    assert opening.rooms_of(settled("cuda", two)) == (Room("cuda:0", 0, 2, 3), Room("cuda:1", 2, 5, 8))
    all_there = replace(two, cards=(SHARE, two.cards[1]))
    assert [room.slots for room in opening.rooms_of(settled("cuda", all_there))] == [8, 8]
