"""The benchmarks still run: on the embedded model, for the shape of what they write; rates are nobody's promise here."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import ROOT, environment


def first_token(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/first_token.py"), *arguments, "--gen", "3", "--runs", "1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in /proc")
def test_the_first_token_and_the_memory_of_a_run(tmp_path: Path) -> None:
    done = first_token("tiny", "--threads", "1", "--out", str(tmp_path / "runs.csv"))
    assert done.returncode == 0, done.stderr
    (run,) = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert (run["file"], run["threads"], run["tokens"]) == ("tiny", "1", "3")
    assert 0 < float(run["first_token_s"]) < 120
    assert 50 < float(run["anonymous_mb"]) < 1000  # tiny is expanded to 40 MB, and torch takes its share
    assert float(run["mapped_mb"]) > 10
    assert done.stdout.splitlines()[-1].startswith("| tiny | 1 | ")


def test_a_run_that_fails_is_shown_in_its_own_words() -> None:
    done = first_token("nonsense")
    assert done.returncode == 1
    assert "There is no model called nonsense." in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="CPU time is asked of the module resource")
def test_a_download_beside_a_plain_copy(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/download.py"), "--mb", "2", "--shards", "2", "--rounds", "1",
               "--scratch", str(tmp_path), "--out", str(tmp_path / "ways.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "ways.csv").read_text().splitlines()))
    assert [row["way"] for row in rows] == ["copy", "pull", "hub", "hash"]
    assert all(float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0 for row in rows)
    assert done.stdout.splitlines()[-3].startswith("| pull | ")
