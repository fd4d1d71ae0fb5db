"""The program in this process, with its streams and exit code; faster than a subprocess, and tests can reach inside."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dsv4cli import cli

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """For a subprocess: this test's own home, and the packages of this checkout."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "quant", "kernels")), **more}


@dataclass(frozen=True)
class Outcome:
    """What a run of the program left behind."""

    code: int
    out: str
    err: str


def dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: bytes = b"") -> Outcome:
    """Runs `dsv4 ARGUMENTS` with `stdin` (never a terminal)."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    shown = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return Outcome(left.value.code, shown.out, shown.err)
