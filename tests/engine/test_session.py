"""A session computes as little as it can and always ends where a fresh session would."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4cli.engine import session as session_module
from dsv4cli.engine.session import Session
from dsv4cli.errors import CapacityError, Interrupted, UsageError
from dsv4cli.model.recording import Recording
from dsv4cli.model.state import Snapshot
from tests.engine.mock_model import VOCABULARY, MockState, Recurrent, engine_of

PROMPT = [token % 7 for token in range(50)]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 5)


@pytest.fixture
def session() -> Session:
    return engine_of(Recurrent()).session()


def computed(session: Session) -> list[int]:
    """Sizes of the forward calls since the last look."""
    model: Recurrent = session.engine.model  # type: ignore[assignment]
    sizes, model.computed = model.computed, []
    return sizes


def fresh(ids: list[int]) -> Tensor:
    return engine_of(Recurrent()).session().sync(ids)


def test_why_tokens_are_not_recorded_is_told(session: Session) -> None:
    session.sync([1, 2, 3])
    assert session.unrecorded is None
    session._state.recording = Recording(torch.device("cpu"), lambda device: None)
    assert session.unrecorded == "nothing records launches here"


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
WALK = st.lists(st.tuples(st.booleans(), IDS, st.integers(0, 40)), min_size=1, max_size=8)


@settings(deadline=None)  # a busy machine is no bug
@given(walk=WALK)
def test_however_it_got_there_the_logits_are_those_of_a_fresh_session(walk: list[tuple[bool, list[int], int]]) -> None:
    """Four ids make common prefixes frequent; steps and marks come in between."""
    session = engine_of(Recurrent()).session()
    for stepping, ids, mark in walk:
        if stepping and session.ids:
            for token in ids:
                logits = session.step(token)
        else:
            logits = session.sync(ids, marks=[mark])
            assert session.ids == ids
        assert torch.equal(logits, fresh(session.ids))
        assert session.position == len(session.ids)


def test_a_longer_sequence_computes_only_what_is_new(session: Session) -> None:
    session.sync([1, 2, 3, 4, 5, 6, 7])
    assert computed(session) == [5, 2]
    session.sync([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert computed(session) == [2]
    assert session.reused == 7


def test_the_same_sequence_computes_nothing(session: Session) -> None:
    first = session.sync([1, 2, 3]).clone()
    computed(session)
    assert torch.equal(session.sync([1, 2, 3]), first)
    assert computed(session) == []
    assert session.reused == 3


def test_the_prompt_again_after_an_answer_computes_nothing(session: Session) -> None:
    first = session.sync([1, 2, 3]).clone()
    for token in (7, 8, 9):
        session.step(token)
    computed(session)
    assert torch.equal(session.sync([1, 2, 3]), first)
    assert computed(session) == []


def test_a_mark_is_where_a_divergence_goes_back_to(session: Session) -> None:
    prompt = list(range(10, 30))
    session.sync(prompt, marks=[17])
    assert computed(session) == [5, 5, 5, 2, 3]
    session.sync([*prompt[:17], 1, 2, 3])
    assert session.reused == 17
    assert computed(session) == [3]


def test_the_end_of_an_answer_is_marked_before_it_is_extended(session: Session) -> None:
    """The next question may be taken back: the conversation goes on from the answer, not from before it."""
    session.sync([1, 2, 3])
    for token in (4, 5, 6):
        session.step(token)
    session.sync([1, 2, 3, 4, 5, 6, 7, 8])
    computed(session)
    session.sync([1, 2, 3, 4, 5, 6, 9])
    assert session.reused == 6
    assert computed(session) == [1]


def test_without_a_snapshot_it_begins_again(session: Session) -> None:
    session.sync([1, 2, 3, 4])
    assert torch.equal(session.sync([1, 2, 9]), fresh([1, 2, 9]))
    assert session.reused == 0


def test_marks_of_another_future_are_forgotten(session: Session) -> None:
    session.sync([1, 2, 3, 4, 5, 6], marks=[2, 4])
    session.sync([1, 2, 3, 9, 9, 9, 9, 9])
    assert torch.equal(session.sync([1, 2, 3, 4, 5, 6]), fresh([1, 2, 3, 4, 5, 6]))
    assert session.reused == 2


def test_the_shelf_keeps_its_bounds() -> None:
    session = engine_of(Recurrent(), shelf_bytes=3 * (VOCABULARY * 4 + 64)).session()
    for end in range(2, 60, 3):
        session.sync(list(range(end)))
        assert session.nbytes <= 64 + 3 * (VOCABULARY * 4 + 64)
    session.sync([*range(50), 0])
    assert 0 < session.reused <= 50  # thinned out, not lost


def test_progress_and_cancellation_between_chunks(session: Session) -> None:
    prompt = list(range(12))
    seen: list[tuple[int, int]] = []
    with pytest.raises(Interrupted, match="10 of 12"):
        session.sync(prompt, progress=lambda done, total: seen.append((done, total)), cancel=lambda: len(seen) == 2)
    assert seen == [(5, 12), (10, 12)]
    assert session.ids == prompt[:10]
    assert torch.equal(session.sync(prompt), fresh(prompt))
    assert session.reused == 10


def test_an_interrupt_inside_a_pass_leaves_a_whole_session(session: Session) -> None:
    session.sync([1, 2, 3])
    model: Recurrent = session.engine.model  # type: ignore[assignment]
    model.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        session.sync([1, 2, 3, 4, 5, 6, 7])
    assert session.ids == [1, 2, 3]
    assert torch.equal(session.sync([1, 2, 3, 4, 5, 6, 7]), fresh([1, 2, 3, 4, 5, 6, 7]))


def test_clear(session: Session) -> None:
    session.sync([1, 2, 3])
    session.clear()
    assert session.position == 0
    with pytest.raises(UsageError, match="empty"):
        _ = session.logits
    assert torch.equal(session.sync([4]), fresh([4]))


@pytest.mark.parametrize(("ids", "said"), [
    ([], "empty"), ([-1], "-1 is outside"), ([1, VOCABULARY], f"{VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
    ([1] * 21, "21 tokens do not fit into the context of 20"),
])
def test_bad_prompts_are_refused_and_change_nothing(ids: list[int], said: str) -> None:
    session = engine_of(Recurrent(), ctx=20).session()
    session.sync([1, 2])
    with pytest.raises(UsageError, match=said):
        session.sync(ids)
    assert session.ids == [1, 2]


def test_a_full_context_refuses_the_next_step() -> None:
    session = engine_of(Recurrent(), ctx=3).session()
    session.sync([1, 2, 3])
    assert session.room == 0
    with pytest.raises(UsageError, match="4 tokens do not fit into the context of 3") as caught:
        session.step(4)
    assert "--ctx" in caught.value.hint
    assert "/clear" in caught.value.hint


class Small(Recurrent):
    """Has memory for so many tokens at once, and, like a real model, something in it while it computes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.refused, self.before = room, 0, list[ReferenceType[Tensor]]()

    def forward(self, ids: Tensor, state: Any, **options: Any) -> Tensor:
        assert all(each() is None for each in self.before), "what failed still lies in memory"
        unfinished = torch.zeros(100)
        self.before.append(ref(unfinished))
        if len(ids) > self.room:
            state.vector += 1  # between two layers
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ...")
        return super().forward(ids, state, **options)


@pytest.fixture
def long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 40)
    monkeypatch.setattr(session_module, "LEAST_CHUNK", 3)


@pytest.mark.usefixtures("long_chunks")
def test_where_memory_is_short_fewer_tokens_are_computed_at_once() -> None:
    """As many as there was room for once, also in prompts to come."""
    model = Small(10)
    session = engine_of(model).session()
    session.sync(PROMPT[:7])
    progress: list[tuple[int, int]] = []
    assert torch.equal(session.sync(PROMPT, marks=[20], progress=lambda *at: progress.append(at)), fresh(PROMPT))
    assert (session.ids, progress[-1]) == (PROMPT, (43, 43))
    assert model.refused == 1  # 13 tokens up to the mark became 6 and 6 and 1
    assert max(model.computed) <= 10
    session.sync(PROMPT[:3] + PROMPT)
    assert model.refused == 1


@pytest.mark.usefixtures("long_chunks")
def test_where_there_is_no_memory_at_all_it_is_a_sentence_and_the_session_stays() -> None:
    model = Small(10)
    session = engine_of(model).session()
    session.sync(PROMPT[:7])
    model.room = 0
    for _ in range(2):
        with pytest.raises(CapacityError, match=r"no memory left: CUDA out of memory\."):
            session.sync(PROMPT)
    assert session.ids == PROMPT[:7]
    model.room = 50
    assert torch.equal(session.sync(PROMPT), fresh(PROMPT))


def test_a_snapshot_for_which_there_is_no_memory_is_done_without(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: MockState) -> Snapshot:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    with monkeypatch.context() as patch:
        patch.setattr(MockState, "snapshot", full)
        assert torch.equal(session.sync(PROMPT, marks=[8]), fresh(PROMPT))
    assert torch.equal(session.sync(PROMPT[:9]), fresh(PROMPT[:9]))  # from the beginning
