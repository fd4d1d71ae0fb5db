"""Decoded tokens of a model whose experts lie in several places, recorded in pieces: no card is here, so a stand-in repeats
them (tests/support/replay.py), and the CPU's memory is the card's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc, backends
from dsv4_quant.files import open_source
from dsv4cli.model import transformer
from dsv4cli.model.experts import Place, TieredExperts
from dsv4cli.model.slots import Desk, Room
from dsv4cli.model.state import Snapshot, State
from dsv4cli.model.transformer import Model
from tests.kernels.interpreter import QUIET
from tests.support.replay import Replay
from tests.support.synth import Checkpoint, Shape

pytest.importorskip("triton")
pytestmark = QUIET

# As small as can be, for the interpreter is slow: a layer that is whole on the card, by hash, and one of which it has a part.
SMALL = Shape(ratios=(0, 0), experts=4, heads=1, vocab=32, rounds=1, hidden=64, width=32, q_rank=32, o_rank=32, o_groups=1,
              streams=2)
BEFORE = 126  # the third token from here is written where the ring begins again
IDS = torch.randint(0, SMALL.vocab, (BEFORE + 3,), generator=torch.Generator().manual_seed(7))
HELD: list[Place] = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2)]
Bind = Callable[..., Model]
Pieces = list[tuple[str, Replay]]


@pytest.fixture(scope="module")
def bind(tmp_path_factory: pytest.TempPathFactory) -> Bind:
    path = Checkpoint(SMALL, seed=5).write(tmp_path_factory.mktemp("synth"))
    return lambda **options: Model.bind(open_source(path), numerics="official", expand_limit=0, **options)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """Pieces, as they are made, with the name of the device."""
    pieces: Pieces = []

    def recorder(device: torch.device) -> Callable[[], Replay]:
        def record() -> Replay:
            alloc.poison(False)  # filling memory would be launches too
            pieces.append((str(device), Replay()))
            return pieces[-1][1]

        return record

    monkeypatch.setattr(transformer, "recorder", recorder)
    return pieces


@pytest.fixture
def interpreted() -> Iterator[None]:
    with backends.interpreted():
        yield


def tiered(model: Model) -> TieredExperts:
    assert model.tiers is not None
    return model.tiers


def decoded(model: Model, state: State, start: Snapshot) -> tuple[Tensor, list[list[int]]]:
    """Logits of three tokens, before the last of which two experts change places; and how many of its choices the host had to
    compute in each layer of each token. Everything is then as before."""
    state.restore(start)
    tiers, rows, away = tiered(model), [], []
    for number, token in enumerate(IDS[BEFORE:].split(1)):
        if number == 2:
            tiers.replace([(1, 0)], [(1, 3)])
        rows.append(model.forward(token, state))
        away.append([sum((layer, expert) not in tiers.resident[0] for expert in chosen[0].tolist())
                     for layer, chosen in tiers.chosen(range(2))])
    tiers.replace([(1, 3)], [(1, 0)])
    return torch.cat(rows), away


def test_pieces_are_bitwise_the_described_steps(bind: Bind, recorded: Pieces, request: pytest.FixtureRequest,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    model = bind(rooms=[Room("cpu", 0, 2, len(HELD))], wanted=HELD)
    state = model.new_state(200)
    model.forward(IDS[:BEFORE], state)  # by the CPU's kernels, which are soon done
    start = state.snapshot()
    request.getfixturevalue("interpreted")
    model.records = False
    described, away = decoded(model, state, start)
    assert recorded == []
    assert [each[0] for each in away] == [0, 0, 0], "the first layer is whole"
    assert {each[1] for each in away} >= {0, 1} or {each[1] for each in away} >= {1, 2}, "no hits, or no misses"

    reads: list[int] = []
    wait = Desk.wait
    monkeypatch.setattr(Desk, "wait", lambda self: reads.append(1) or wait(self))
    model.records, state.recording = True, None
    made, seen = decoded(model, state, start)
    assert torch.equal(made, described)
    assert seen == away, "what was chosen is counted in replayed tokens too"
    assert len(reads) == 3, "the host reads choices of layers that are not whole, and no others"
    assert [piece.replayed for _, piece in recorded] == [2, 2, 2]  # until the choice, beside the host, the rest
    assert state.recording is not None
    assert state.recording.trouble is None


@pytest.mark.usefixtures("interpreted")
def test_a_piece_belongs_to_one_card(bind: Bind, recorded: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bind(rooms=[Room("cpu", 0, 1, 4), Room("cpu", 1, 2, 4)])
    far, near = torch.device("cpu", 1), model.device  # a name of the CPU that no tensor bears
    monkeypatch.setattr(model, "devices", [near, far])
    monkeypatch.setattr(model, "ropes", {near: model.ropes[near], far: model.ropes[near]})
    state = model.new_state(200)
    start = state.snapshot()
    first = model.forward(IDS[:1], state)
    state.restore(start)
    assert torch.equal(model.forward(IDS[:1], state), first)
    assert [(device, piece.replayed) for device, piece in recorded] == [("cpu", 1), ("cpu:1", 1)]


@pytest.mark.usefixtures("interpreted", "recorded")
def test_recordings_are_dropped_when_what_they_know_has_moved(bind: Bind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bind(rooms=[Room("cpu", 0, 2, len(HELD))], wanted=HELD)
    monkeypatch.setattr(model, "_computed", lambda streams, step, state, wanted: streams[:, 0, :1] * 1.)
    state, tiers = model.new_state(200), tiered(model)

    def recording() -> object:
        model.forward(IDS[:1], state)
        return state.recording

    first = recording()
    tiers.replace([(1, 0)], [(1, 1)])
    assert recording() is first, "the table that the kernels read was changed, and nothing else"
    tiers.replace([(0, 0)], [(1, 0)])
    second = recording()
    assert second is not first, "no layer is whole any more"
    assert recording() is second
    tiers.shrink()
    assert recording() is not second, "memory of the card's was given back"
