"""`dsv4 plan`: bytes by purpose without torch, exit code 3 and what to change where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4cli.commands import opening
from dsv4cli.engine import memory
from dsv4cli.engine.memory import MemoryPlan
from tests.support.program import Outcome
from tests.support.synth import Checkpoint, Shape

Run = Callable[..., Outcome]


def test_a_plan_for_programs(run_dsv4: Run) -> None:
    done = run_dsv4("plan", "tiny", "--ctx", "4096", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    purposes = ("program", "vocabulary", "weights", "expanded", "state", "snapshots", "scratch")
    assert made["needed"] == sum(made[purpose] for purpose in purposes)
    assert (made["name"], made["context"], made["numerics"], made["fits"]) == ("tiny", 4096, "official", True)
    plain = json.loads(run_dsv4("plan", "tiny", "--ctx", "4096", "--numerics", "plain", "--json").out)
    assert plain["state"] > 1.5 * made["state"]


def test_a_plan_for_people(run_dsv4: Run) -> None:
    done = run_dsv4("plan", "tiny", "--ram", "2GB")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["PURPOSE", "RAM", "disk"]
    assert ["available", "2.0", "GB"] in map(str.split, lines)
    assert ["context", "32,768", "tokens"] in map(str.split, lines)


def test_what_does_not_fit_says_what_would(run_dsv4: Run) -> None:
    needs = json.loads(run_dsv4("plan", "tiny", "--ctx", "8192", "--json").out)["needed"]
    done = run_dsv4("plan", "tiny", "--ctx", "32768", "--ram", str(needs + 10))
    assert done.code == 3
    assert "tiny needs" in done.err
    assert "--ctx 8192 would fit" in done.err
    done = run_dsv4("plan", "tiny", "--ram", "100MB", "--json")
    assert done.code == 3
    assert json.loads(done.out)["fits"] is False
    assert "No context is short enough" in done.err


def test_what_makes_a_model_slow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    small = MemoryPlan(1, program=10**9, vocabulary=0, weights=8 * 10**9, expanded=0, state=0, snapshots=0, scratch=0,
                       available=6 * 10**9, experts=7 * 10**9, busy=10**8)
    monkeypatch.setattr(memory, "swapped_bytes", lambda: 3 * 10**9)
    assert opening.warnings("flash", small) == [
        "flash is larger than the 6.0 GB of memory here; experts in RAM: 4.0 GB of 7.0 GB, the rest is read from the disk."]
    monkeypatch.setattr(memory, "swapped_bytes", lambda: 4 * 10**9)
    assert "4.0 GB of programs are in swap" in opening.warnings("flash", small)[1]
    assert opening.warnings("flash", replace(small, available=20 * 10**9)) == []


def test_experts_for_which_there_is_no_memory_stay_on_the_disk(run_dsv4: Run, tmp_path: Path) -> None:
    shape = Shape(ratios=(0, 4), hidden=1024, width=512, experts=96, q_rank=128)
    model = str(Checkpoint(shape, seed=2).write(tmp_path / "large"))
    whole = json.loads(run_dsv4("plan", model, "--ctx", "512", "--ram", "8GB", "--json").out)
    assert (whole["fits"], whole["on_disk"], whole["experts"] > 0) == (True, 0, True)
    done = run_dsv4("plan", model, "--ctx", "512", "--ram", str(whole["needed"] - whole["experts"] // 2))
    assert done.code == 0, done.err
    placed = next(line for line in done.out.splitlines() if line.startswith("experts"))
    assert placed.split(maxsplit=1) == ["experts", "96 of 192 in RAM, 96 on the disk"]
    done = run_dsv4("plan", model, "--ctx", "512", "--ram", str(whole["least"] - 1))
    assert (done.code, "No context is short enough" in done.err) == (3, True)


def test_a_machine_with_cards(run_dsv4: Run, tmp_path: Path) -> None:
    shape = Shape(ratios=(0, 4), hidden=1024, width=512, experts=96, q_rank=128)
    model = str(Checkpoint(shape, seed=2).write(tmp_path / "large"))
    done = run_dsv4("plan", model, "--ctx", "512", "--vram", "660MB", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    (card,) = made["cards"]
    assert 0 < card["slots"] < card["experts"] == made["routed"] == 192
    assert made["placed"] == {"vram": card["slots"], "ram": 192 - card["slots"], "disk": 0}
    assert sum(made["tiers"]["GPU"].values()) <= 660_000_000
    done = run_dsv4("plan", model, "--ctx", "512", "--vram", "1GB,1GB")
    assert done.out.split("\n")[0].split() == ["PURPOSE", "GPU", "0", "GPU", "1", "RAM"]
    done = run_dsv4("plan", model, "--vram", "100MB", "--json")
    assert done.code == 3
    assert "memory of the GPU" in done.err
    assert json.loads(done.out)["decode"]["why"] == "it does not fit"
    done = run_dsv4("plan", model, "--ctx", "512", "--vram", "1GB,100MB")
    assert (done.code, "1 of the 2 GPUs has no layer" in done.out) == (0, True)


def test_a_size_that_is_none(run_dsv4: Run) -> None:
    done = run_dsv4("plan", "tiny", "--ram", "much")
    assert done.code == 2
    assert "--ram much" in done.err
    done = run_dsv4("plan", "tiny", "--vram", "24GB,")
    assert done.code == 2
    assert "--vram" in done.err


def test_more_of_a_card_than_there_is(run_dsv4: Run) -> None:
    """Without a card, a share of one cannot be had either; a limit that is no size is said before anything is opened."""
    done = run_dsv4("bench", "tiny", "--vram", "5XB")
    assert (done.code, "--vram 5XB" in done.err) == (2, True)
    if not torch.cuda.is_available():
        done = run_dsv4("bench", "tiny", "--vram", "4GB")
        assert (done.code, "Nothing can run on cuda" in done.err) == (2, True)


def test_no_torch_is_needed() -> None:
    code = ("import sys; from dsv4cli import cli\ntry: cli.main(['plan', 'tiny', '--json'])\nexcept SystemExit as end: "
            "print('torch' in sys.modules, end.code, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False 0"
