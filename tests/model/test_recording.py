"""A decoded token's launches, recorded and replayed: on the CPU by tapes; no card is here, so a stand-in repeats its
(tests/support/replay.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc, backends
from dsv4_kernels.hyper import cpu as hyper
from dsv4_quant.files import open_source
from dsv4cli.model import transformer
from dsv4cli.model.recording import ByHost, Recording, recorder
from dsv4cli.model.state import Snapshot, State
from dsv4cli.model.transformer import Model
from tests.kernels.interpreter import QUIET
from tests.support.replay import Replay
from tests.support.synth import Checkpoint, Shape
from tests.support.tolerance import CHUNKS, assert_close

pytest.importorskip("triton")
pytestmark = QUIET

# Both kinds of layers that compress; their window is that of the others. Of 32 entries, which 128 tokens make, one too many
# to look at.
SMALL = Shape(ratios=(4, 128), experts=4, heads=2, index_heads=2, index_topk=31, vocab=64, rounds=2,
              hidden=128, width=64, q_rank=128, o_rank=32)
BEFORE = 126
# The ring is full at 128 tokens, which complete a group of 128 and one of 4; from then on the indexer chooses.
IDS = torch.randint(0, SMALL.vocab, (BEFORE + 6,), generator=torch.Generator().manual_seed(7))
KINDS = {((), False, 1), ((4, 128), True, 1), ((), True, 1), ((4,), True, 1)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(SMALL, seed=5).write(tmp_path_factory.mktemp("synth"))


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model.bind(open_source(path), numerics="official")


@pytest.fixture(scope="module")
def prompted(model: Model) -> tuple[State, Snapshot]:
    """By the CPU's kernels, which are soon done."""
    state = model.new_state(1100)
    state.reserve(len(IDS))
    model.forward(IDS[:BEFORE], state)
    return state, state.snapshot()


@pytest.fixture
def interpreted() -> Iterator[None]:
    with backends.interpreted():
        yield


def decoded(model: Model, state: State, start: Snapshot) -> Tensor:
    state.restore(start)
    return torch.cat([model.forward(token, state) for token in IDS[BEFORE:].split(1)])


@pytest.mark.usefixtures("interpreted")
def test_replayed_tokens_are_bitwise_the_described_ones(model: Model, prompted: tuple[State, Snapshot],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """With packed caches, as cards keep them, behind a prompt whose caches were not."""
    state, start = State(model.config, 1100, model.numerics, packed=True), prompted[1]
    runs: list[Replay] = []

    def record() -> Replay:
        alloc.poison(False)  # filling memory would be launches too
        runs.append(Replay())
        return runs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(backends, "repeatable", lambda device: False)
        by_host = decoded(model, state, start)  # positions are numbers of the host, as in prompts
    assert state.recording is None
    monkeypatch.setattr(transformer, "recorder", lambda device: record)
    for met in (1, 2, 3):
        assert torch.equal(decoded(model, state, start), by_host), f"round {met}"
    recording = state.recording
    assert isinstance(recording, Recording)
    assert recording.trouble is None
    assert set(recording._runs) == KINDS
    assert len(runs) == len(KINDS), "a token that the host has no part in is one piece"
    assert all(run.replayed for run in runs), "a kind was recorded and never replayed"
    after = state.snapshot()
    state.reserve(1025)  # moves the storage, whose addresses the recorded runs know
    assert state.recording is None
    assert torch.equal(model.forward(IDS[:1], state), _next(model, after))


def _next(model: Model, after: Snapshot) -> Tensor:
    """The next token's logits in a state of its own."""
    other = State(model.config, 400, model.numerics, packed=True)
    other.restore(after)
    return model.forward(IDS[:1], other)


def test_where_something_waits_for_the_card_nothing_is_recorded_and_it_is_said() -> None:
    """And what was begun is ended, wherever it comes."""
    class Refusing(Replay):
        def end(self) -> None:
            ended.append(self)
            super().end()
            if len(ended) % 2 == 0:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    def compute(ids: Tensor, position: Tensor, by_host: ByHost) -> Tensor:
        x = 100 * ids
        by_host(lambda: acted.append(int(x)))
        return x + position

    ended: list[Replay] = []
    acted: list[int] = []
    recording = Recording(torch.device("cpu"), lambda device: Refusing)
    found = [recording.run("kind", torch.tensor([id]), 10 + id, compute) for id in range(4)]
    assert torch.cat(found).tolist() == [10, 111, 212, 313]
    assert acted == [0, 100, 200, 300]
    assert recording.trouble == "operation not permitted when stream is capturing"
    assert len(ended) == 3, "of two pieces the second is ended again"


def test_the_host_acts_between_two_pieces_and_only_when_they_are_computed() -> None:
    made, desk, acted = list[Replay](), torch.zeros(2, 1, dtype=torch.int64), list[int]()

    def record() -> Replay:
        made.append(Replay())
        return made[-1]

    def answer() -> None:
        acted.append(int(desk[0]))
        desk[1] = -desk[0]

    def compute(ids: Tensor, position: Tensor, by_host: ByHost) -> Tensor:
        desk[0].copy_(ids * position)
        by_host(answer)
        return desk[1] + 1

    devices: list[str] = []
    recording = Recording(torch.device("cpu"), lambda device: devices.append(device.type) or record)
    found = [int(recording.run("kind", torch.tensor([id]), 7, compute)) for id in (1, 2, 3, 4)]
    assert (found, acted) == ([-6, -13, -20, -27], [7, 14, 21, 28])
    assert [piece.replayed for piece in made] == [3, 3]
    assert devices == ["cpu"]


def test_the_stand_in_notices_who_reads_what_the_device_computes() -> None:
    x, piece = torch.ones(3), Replay()
    piece.begin()
    with pytest.raises(RuntimeError, match="_local_scalar_dense waits"):
        x * int(x.sum())
    piece.abandon()


def test_the_stand_in_computes_nothing_before_it_is_replayed() -> None:
    x, piece = torch.ones(3), Replay()
    piece.begin()
    y = x + 1
    x.add_(y)
    piece.end()
    assert torch.equal(x, torch.ones(3))
    assert y.isnan().all()
    for sums in (3., 7.):
        piece.replay()
        assert x.tolist() == [sums] * 3


@pytest.mark.skipif(backends.cpu_trouble() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("numerics", ["plain", "official"])
@pytest.mark.parametrize("expand_limit", [0, 10 ** 9])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_tape_of_the_cpus_kernels_says_what_described_tokens_say(threads: int, expand_limit: int, numerics: str,
                                                                   path: Path) -> None:
    """Bitwise, whichever layers and however many threads; there is nobody who would watch."""
    backends.use_threads(threads)
    source, found = open_source(path), []
    for records in (False, True):
        model = Model.bind(source, numerics=numerics, expand_limit=expand_limit, records=records)
        state = model.new_state(1100)
        state.reserve(len(IDS))
        model.forward(IDS[:BEFORE], state)
        start = state.snapshot()
        found += [decoded(model, state, start) for _ in range(3)]
        recording = state.recording
        assert isinstance(recording, Recording)
        assert set(recording._runs) == (KINDS if records else set())
        assert (recording.trouble is None) == records
        state.reserve(1025)
        assert state.recording is None, "the storage has moved"
    backends.use_threads(2)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.skipif(backends.cpu_trouble() is not None, reason="no C++ compiler")
def test_what_the_cpus_kernels_cannot_compute_is_described_and_it_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.bind(open_source(path), numerics="plain")
    expected = decoded(model, state := model.new_state(len(IDS)), state.snapshot())
    monkeypatch.setattr(hyper, "_fits", lambda *tensors: False)
    assert_close(decoded(model, state := model.new_state(len(IDS)), state.snapshot()), expected, CHUNKS)
    assert state.recording is not None
    assert state.recording.trouble == "a part of it is computed by torch, or needs what kernels have yet to compute"


def test_who_records() -> None:
    on_cpu = backends.cpu_trouble() is None
    assert (recorder(torch.device("cpu")) is not None) == backends.repeatable("cpu") == on_cpu
    with backends.watched(lambda door, given: None):
        assert not backends.repeatable("cuda")
        assert not backends.repeatable("cpu")
    assert backends.repeatable("cuda")
    with backends.interpreted():
        assert recorder(torch.device("cpu")) is None, "the interpreter's launches are Python's"
        assert backends.repeatable("cpu")
