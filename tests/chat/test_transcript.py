"""Conversations as files: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4cli import paths
from dsv4cli.chat import transcript
from dsv4cli.chat.transcript import Transcript
from dsv4cli.errors import CorruptError, Dsv4Error, UsageError


def conversation() -> Transcript:
    said = Transcript("Be brief.")
    said.ask("Wie heißt du? \u2028 <｜User｜>")
    said.answer("dsv4", reasoning="They ask for my name.")
    return said


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    transcript.save(conversation(), tmp_path / "a.json", model="tiny", release="april")
    assert transcript.load(tmp_path / "a.json") == conversation()
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (document["format"], document["version"], document["model"]) == ("dsv4-transcript", 1, "tiny")


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    transcript.save(conversation(), file, model="tiny", release="april")
    broken = conversation()
    broken.turns.append({"role": "user", "content": {1, 2}})  # a set has no JSON form
    with pytest.raises(TypeError):
        transcript.save(broken, file, model="tiny", release="april")
    assert transcript.load(file) == conversation()
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_written_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises((Dsv4Error, OSError)):
        transcript.save(conversation(), tmp_path / "taken" / "a.json", model="tiny", release="april")


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"format": "dsv4-transcript", "version": 2, "messages": []}', '{"format": "dsv4-transcript", "version": 1}',
    '{"format": "dsv4-transcript", "version": 1, "messages": [{"role": "pirate", "content": "x"}]}',
    '{"format": "dsv4-transcript", "version": 1, "messages": [{"role": "user", "content": 5}]}',
])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(CorruptError, match=r"a\.json"):
        transcript.load(tmp_path / "a.json")


def test_bytes_that_are_not_utf8_are_damage_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"format": "\xff"}')
    with pytest.raises(CorruptError):
        transcript.load(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "x" * 101, "a\0b"])
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        transcript.path_of(name)


def test_names_lie_in_the_sessions_folder() -> None:
    assert transcript.path_of("über-1.2") == paths.sessions() / "über-1.2.json"


def test_undo_takes_tool_messages_along() -> None:
    said = Transcript(turns=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                             {"role": "user", "content": "c"}, {"role": "assistant", "content": ""},
                             {"role": "tool", "content": "5"}, {"role": "assistant", "content": "d"}])
    assert said.undo() == "c"
    assert [turn["content"] for turn in said.turns] == ["a", "b"]
    assert said.undo() == "a"
    assert said.undo() == ""
