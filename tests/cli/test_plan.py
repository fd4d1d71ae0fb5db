"""`dsv4 plan`: bytes by purpose without torch, exit code 3 and what to change where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

from tests.support.program import Outcome

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
    assert "state for 32768 tokens" in done.out
    assert done.out.splitlines()[-1].split() == ["available", "2.0", "GB"]


def test_what_does_not_fit_says_what_would(run_dsv4: Run) -> None:
    needs = json.loads(run_dsv4("plan", "tiny", "--ctx", "8192", "--json").out)["needed"]
    done = run_dsv4("plan", "tiny", "--ctx", "32768", "--ram", str(needs + 10))
    assert done.code == 3
    assert "tiny does not fit" in done.err
    assert "--ctx 8192 would fit" in done.err
    done = run_dsv4("plan", "tiny", "--ram", "100MB", "--json")
    assert done.code == 3
    assert json.loads(done.out)["fits"] is False
    assert "No context is short enough" in done.err


def test_a_size_that_is_none(run_dsv4: Run) -> None:
    done = run_dsv4("plan", "tiny", "--ram", "much")
    assert done.code == 2
    assert "--ram much" in done.err


def test_no_torch_is_needed() -> None:
    code = ("import sys; from dsv4cli import cli\ntry: cli.main(['plan', 'tiny', '--json'])\nexcept SystemExit as end: "
            "print('torch' in sys.modules, end.code, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False 0"
