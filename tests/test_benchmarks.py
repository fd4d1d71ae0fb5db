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


def quantize(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/quantize.py"), *arguments, "--rows", "4", "--rounds", "1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def test_rates_and_errors_of_the_encoders(tmp_path: Path) -> None:
    done = quantize("q4_k", "f16", "--llama", "wheel", "--out", str(tmp_path / "formats.csv"))
    assert done.returncode == 0, done.stderr
    q4_k, f16 = csv.DictReader((tmp_path / "formats.csv").read_text().splitlines())
    assert (q4_k["format"], q4_k["bits"], f16["bits"]) == ("q4_k", "4.5", "16.0")
    assert 0.004 < float(q4_k["error"]) < float(q4_k["llama_error"]) < 0.006
    assert float(f16["error"]) == float(f16["llama_error"])
    assert min(float(q4_k[key]) for key in ("one_thread", "two_threads", "llama_rate")) > 0
    unknown = quantize("q9_k")
    assert unknown.returncode == 2
    assert "nothing is written as q9_k" in unknown.stderr
