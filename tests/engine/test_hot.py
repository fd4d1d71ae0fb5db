"""What is kept in a card's slots: learned from all sessions, saved, given back; with the CPU's memory as the card."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_quant.files import open_source
from dsv4cli import Engine
from dsv4cli.engine import engine as opened
from dsv4cli.engine import hot, opening
from dsv4cli.engine.cards import CardShare
from dsv4cli.engine.device import Place
from dsv4cli.engine.hot import Counts, Hot, Pace, counts_path
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.engine.placement import Load, Rates
from dsv4cli.engine.rates import Costs
from dsv4cli.errors import CapacityError
from dsv4cli.model.experts import TieredExperts
from dsv4cli.model.slots import Room
from dsv4cli.model.transformer import Model
from tests.engine.mock_model import byte_tokenizer_json
from tests.support.synth import Checkpoint, Shape
from tests.support.tolerance import CHUNKS, assert_close

SHAPE = Shape(ratios=(0, 4, 128), experts=8)
LAYERS, SLOTS = len(SHAPE.ratios), 9
IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(2)).tolist()
SHARE = CardShare(0, LAYERS, None, 0, 0, 0, 0, 0, 0, expert=53_000, experts=LAYERS * SHAPE.experts, slots=SLOTS)
ROOM = Room("cpu", 0, LAYERS, SLOTS)
SECONDS = Costs(0, 0, 1e-7, 1e-6, 3e-5, 0, card=True)
PACE = Pace(Load(LAYERS, SHAPE.experts, SHARE.expert, 0), SECONDS, Rates(5e11, 5e10, 2e9, 5e10), SHAPE.chosen)
Opened = Callable[[], Engine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Checkpoint(SHAPE, seed=3).write(tmp_path_factory.mktemp("models") / "random")
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    return folder


@pytest.fixture
def on_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Opens the model on a card for SLOTS experts, which is the CPU."""
    plan = MemoryPlan(512, 0, 0, 0, 0, 64, 1 << 30, 0, available=None, cards=(SHARE,))
    monkeypatch.setattr(opening, "place_of", lambda *_: Place("cpu", "it was asked for", plan))
    bind = Model.bind
    monkeypatch.setattr(opened.Model, "bind", lambda *given, **options: bind(*given, expand_limit=0, **options))
    monkeypatch.setattr(hot, "HORIZON", 8)
    return lambda: Engine.open(folder, numerics="plain")


def keeper(engine: Engine) -> Hot:
    assert engine.hot is not None
    return engine.hot


def rows(engine: Engine, session: Any = None) -> Tensor:
    session = session or engine.session()
    return torch.stack([session.sync(IDS[:20]), *(session.step(token) for token in IDS[20:])])


def test_an_engine_learns_and_computes_the_same(on_card: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    real = TieredExperts.replace
    monkeypatch.setattr(TieredExperts, "replace", lambda self, out, into: moved.append(len(into)) or real(self, out, into))
    monkeypatch.setattr(hot, "LINK", 1e15)  # copies cost nothing
    engine = on_card()
    learned = rows(engine)
    assert sum(moved) > 0, "nothing was exchanged"
    learner, = keeper(engine).learners
    assert engine.model.tiers is not None
    assert engine.model.tiers.resident == [learner.placement.vram]
    assert len(learner.placement.vram) == SLOTS
    assert sum(learner.counts.values()) == pytest.approx(learner.seen * LAYERS * SHAPE.chosen, rel=0.3)  # halved now and then
    with monkeypatch.context() as patch:
        patch.setattr(opening, "rooms_of", lambda _: ())
        assert_close(learned, rows(on_card()), CHUNKS)


def test_what_was_learned_is_there_at_the_next_start(on_card: Opened) -> None:
    engine = on_card()
    rows(engine)
    path, learner = counts_path(engine.fingerprint), keeper(engine).learners[0]
    counts = dict(learner.counts)
    assert path.is_file()
    assert not list(path.parent.glob(".*"))
    del engine, learner  # what came after the last exchange is saved too
    again = on_card()
    assert not Counts.load(path, replace(again.config, n_routed_experts=9)).chosen  # another model's
    assert {place: count for place, count in keeper(again).learners[0].counts.items() if count} == \
        {place: count for place, count in counts.items() if count}
    assert again.model.tiers is not None
    pace = Pace.of(again.config, SHARE)
    assert again.model.tiers.resident == [set(keeper(again).counts.dealt([ROOM], pace))]


@pytest.mark.parametrize("damage", [
    "", "{", "[]", '{"seen": 1}', '{"seen": -1, "chosen": []}', '{"seen": 1e999, "chosen": []}', '{"seen": 5, "chosen": [[1]]}',
    json.dumps({"seen": 5, "chosen": [[-1] * 8] * 3}), json.dumps({"seen": 5, "chosen": [[0.5] * 8] * 3}),
    json.dumps({"seen": True, "chosen": [[1] * 8] * 3})])
def test_a_damaged_file_counts_as_none(damage: str, tmp_path: Path, folder: Path) -> None:
    config = open_source(folder).config
    whole = Counts(LAYERS, SHAPE.experts, hot.Counter({(1, 2): 3, (0, 7): 9}), 12)
    whole.save(tmp_path / "counts.json")
    assert Counts.load(tmp_path / "counts.json", config) == whole
    (tmp_path / "counts.json").write_text(damage)
    assert Counts.load(tmp_path / "counts.json", config) == Counts(LAYERS, SHAPE.experts)


def test_slots_are_dealt_by_time_and_the_most_frequent_come_first() -> None:
    seen = {(0, 1): 90, (0, 4): 80, (1, 2): 100, (2, 7): 70}
    dealt = Counts(LAYERS, SHAPE.experts, hot.Counter(seen), 100).dealt([ROOM._replace(slots=4)], PACE)
    assert dealt == [(1, 2), (0, 1), (0, 4), (2, 7)]
    two = [ROOM._replace(last=1, slots=1), ROOM._replace(first=1, slots=2)]
    assert Counts(LAYERS, SHAPE.experts, hot.Counter(seen), 100).dealt(two, PACE) == [(1, 2), (0, 1), (2, 7)]
    assert len(Counts(LAYERS, SHAPE.experts).dealt([ROOM], PACE)) == SLOTS


def test_two_sessions_do_not_drive_each_others_experts_out(on_card: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prefers experts of its own. Alternating, they agree on a placement and keep it, whoever spoke last."""
    monkeypatch.setattr(hot, "HORIZON", 32)
    monkeypatch.setattr(Counts, "dealt", lambda *_: [(layer, number) for number in range(3) for layer in range(LAYERS)])
    engine = on_card()
    tiers = engine.model.tiers
    assert tiers is not None
    keep, rng, moved = keeper(engine), random.Random(1), list[int]()
    real = TieredExperts.replace
    monkeypatch.setattr(TieredExperts, "replace", lambda self, out, into: moved.append(len(into)) or real(self, out, into))
    for token in range(4000):
        mine = (0, 1, 2, 3) if token // 50 % 2 else (3, 4, 5, 6)
        for layer in tiers.layers:
            layer.seen[:] = [torch.tensor([rng.sample(mine, 2)])]
        keep.observe()
        if token == 2000:
            moved.clear()
    assert all((layer, 3) in tiers.resident[0] for layer in range(LAYERS)), "what both need is not there"
    assert sum(moved) <= 2, f"{sum(moved)} experts were exchanged in 2,000 tokens"


def test_a_card_that_runs_out_of_memory_gives_slots_back(on_card: Opened, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a token, with a session that has to begin again from its last snapshot."""
    expected = rows(on_card())
    engine = on_card()
    assert engine.model.tiers is not None
    left, real = [3], TieredExperts.computing

    def refusing(self: TieredExperts) -> Any:
        left[0] -= 1
        if left[0] in (0, -4):
            state["session"]._state.torn = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return real(self)

    state = {"session": engine.session()}
    with monkeypatch.context() as patch:
        patch.setattr(TieredExperts, "computing", refusing)
        made = rows(engine, state["session"])
    assert_close(made, expected, CHUNKS)
    assert len(engine.model.tiers.resident[0]) == 6  # 5 pieces of 2 at the most, of which two went, one of them of one
    assert state["session"].ids == IDS
    assert capsys.readouterr().err.count("less free memory") == 1


def test_without_slots_left_it_is_a_sentence(on_card: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_card()

    def full(self: TieredExperts) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(TieredExperts, "computing", full)
    session = engine.session()
    with pytest.raises(CapacityError, match=r"no memory left: CUDA out of memory\."):
        session.sync(IDS[:5])
    assert (session.ids, engine.model.tiers and engine.model.tiers.resident) == ([], [set()])


def test_learners_have_the_layers_of_their_card(folder: Path, tmp_path: Path) -> None:
    model = Model.bind(open_source(folder), expand_limit=0, rooms=[Room("cpu", 0, 1, 2), Room("cpu", 1, 3, 5)])
    assert model.tiers is not None
    counts = Counts(LAYERS, SHAPE.experts, hot.Counter({(0, 7): 3, (2, 1): 2}), 9)
    one, other = Hot(model.tiers, counts, PACE, tmp_path / "counts.json").learners
    assert (one.counts, other.counts) == ({(0, 7): 3}, {(2, 1): 2})
    assert (len(one.placement.vram), len(one.placement.ram)) == (2, 6)
    assert (len(other.placement.vram), len(other.placement.ram)) == (5, 11)
