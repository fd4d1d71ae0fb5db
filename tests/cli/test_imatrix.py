"""`dsv4 imatrix`: the command over the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.program import Outcome

Run = Callable[..., Outcome]


def test_the_command(run_dsv4: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello " * 30, encoding="utf-8")
    arguments = ("imatrix", "tiny", "-o", str(tmp_path / "a.gguf"), "--text", str(tmp_path / "text"), "--ctx", "16")
    shown = run_dsv4(*arguments)
    assert shown.code == 0, shown.err
    assert shown.out.startswith(f"{tmp_path / 'a.gguf'}: ")
    told = json.loads(run_dsv4(*arguments, "--json").out)
    assert len(told["unvisited"]) == sum(f"layer {each['layer']}: " in shown.out for each in told["unvisited"])
    assert f"{len(told['unvisited'])} of 32 experts were never visited" in shown.out or not told["unvisited"]


@pytest.mark.parametrize(("more", "sentence"), [
    (("--text", "nowhere"), "nowhere cannot be read"), (("--text", "-"), "The calibration text is empty"),
    (("--ctx", "1"), "no room for a text"), (("-o", "nowhere/a.gguf"), "There is no folder"), (("-o", "."), "is a folder")])
def test_what_cannot_be_collected(run_dsv4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  more: tuple[str, str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run_dsv4("imatrix", "tiny", *(("-o", "a.gguf") if more[0] != "-o" else ()), *more)
    assert (shown.code, shown.out) == (2, "")
    assert sentence in shown.err
    assert list(tmp_path.iterdir()) == []
