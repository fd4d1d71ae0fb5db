"""Saved sessions: bitwise the same afterwards, refused by other models, and never half written or half read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4cli.engine import atomic
from dsv4cli.engine.session import Session
from dsv4cli.errors import CapacityError, CorruptError, Dsv4Error, UsageError
from tests.engine.mock_model import Recurrent, engine_of


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Session, Path]:
    session = engine_of(Recurrent()).session()
    session.sync([1, 2, 3])
    session.step(4)
    path = tmp_path / "talk.session"
    session.save(path)
    return session, path


def test_a_loaded_session_goes_on_bitwise(saved: tuple[Session, Path]) -> None:
    session, path = saved
    other = engine_of(Recurrent()).session()
    other.load(path)
    assert other.ids == [1, 2, 3, 4]
    assert torch.equal(other.logits, session.logits)
    assert torch.equal(other.step(5), session.step(5))
    assert torch.equal(other.sync([1, 2, 3, 4, 6]), session.sync([1, 2, 3, 4, 6]))  # the load left a mark
    assert other.reused == 4


def test_only_the_finished_file_is_there(saved: tuple[Session, Path]) -> None:
    _, path = saved
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_another_model_is_refused_by_name(saved: tuple[Session, Path]) -> None:
    other = engine_of(Recurrent(), fingerprint="other").session()
    other.sync([7])
    with pytest.raises(UsageError, match="saved by mock"):
        other.load(saved[1])
    assert other.ids == [7]


def test_a_smaller_context_is_refused_with_both_numbers(saved: tuple[Session, Path]) -> None:
    with pytest.raises(UsageError, match="4 tokens do not fit into the context of 3"):
        engine_of(Recurrent(), ctx=3).session().load(saved[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_corrupt(saved: tuple[Session, Path], share: float) -> None:
    session, path = saved
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(CorruptError):
        session.load(path)
    assert session.ids == [1, 2, 3, 4]


def test_one_flipped_bit_is_found(saved: tuple[Session, Path]) -> None:
    session, path = saved
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        session.load(path)


def test_some_other_file_is_no_session(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(CorruptError, match="not a session"):
        engine_of(Recurrent()).session().load(tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="no session file"):
        engine_of(Recurrent()).session().load(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file(saved: tuple[Session, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session, path = saved
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(CapacityError, match="No space left") as caught:
        session.save(path)
    assert caught.value.exit_code == 3
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_not_there(saved: tuple[Session, Path], tmp_path: Path) -> None:
    with pytest.raises(Dsv4Error, match="Cannot write"):
        saved[0].save(tmp_path / "nowhere" / "talk.session")
