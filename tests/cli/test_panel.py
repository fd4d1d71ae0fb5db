"""What `run` and `chat` say of a model before it answers: in a frame on terminals, aligned without colours, nothing in pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest

from dsv4cli import Engine, console
from dsv4cli.commands import opening
from dsv4cli.engine.rates import UNMEASURED, Foretold
from tests.support.program import Outcome

if sys.platform != "win32":
    from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
ASK = ("-m", "dsv4cli", "run", "tiny", "Hello!", "--think", "off", "--temp", "0", "--max-tokens", "4")
FACTS = [("model", "tiny"), ("memory", "354.8 MB of 23.7 GB available")]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("tiny")


def bare(text: str) -> list[str]:
    return text.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[22m", "").splitlines()


def test_a_frame_is_as_wide_as_its_longest_line() -> None:
    assert bare(console.panel("dsv4", FACTS, 80)) == [
        "╭─ dsv4 ────────────────────────────────╮",
        "│ model   tiny                          │",
        "│ memory  354.8 MB of 23.7 GB available │",
        "╰───────────────────────────────────────╯"]


@pytest.mark.parametrize("columns", [24, 40])
def test_what_is_too_long_is_folded(columns: int) -> None:
    lines = bare(console.panel("dsv4", FACTS, columns))
    assert len(lines) > 4
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= columns
    assert " ".join(line.strip("│ ") for line in lines[2:-1]).split() == ["memory", *FACTS[1][1].split()]


def test_characters_of_two_columns_do_not_bend_the_frame() -> None:
    first, model, last = bare(console.panel("dsv4", [("model", "模型-q2")], 80))
    assert len(first) == len(last) == len(model) + 2


def test_a_rate_is_told_in_a_few_words(engine: Engine) -> None:
    def row(low: float | None, high: float | None, why: str) -> str | None:
        return dict(opening.facts(replace(engine, foretold=Foretold(low, high, why)))).get("decode")

    assert row(15.2, 26.9, "by what was found") == "about 15 to 27 tok/s, the lower with a full context"
    assert row(None, None, UNMEASURED) == "not measured: dsv4 doctor --measure would tell"
    assert row(None, None, "so small a model waits") is None
    whole = dict(opening.details(replace(engine, foretold=Foretold(15.2, 26.9, "by what was found"))))
    assert whole["decode"] == "about 15 to 27 tok/s (by what was found)"


def test_nothing_in_pipes(run_dsv4: Run) -> None:
    assert "numerics" not in run_dsv4(*ASK[2:]).err


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
@pytest.mark.parametrize(("more", "env", "first"), [
    ((), {}, "╭─ dsv4 ─"), ((), {"NO_COLOR": "1"}, "model     tiny"), (("--quiet",), {}, None)])
def test_run_says_it_on_a_terminal(more: tuple[str, ...], env: dict[str, str], first: str | None) -> None:
    terminal = Terminal([*ASK, *more], env={"OMP_NUM_THREADS": "1", **env})
    assert terminal.wait_for_end() == 0
    shown = [line for line in terminal.lines() if line and not line.startswith("opening")]
    terminal.close()
    assert ("numerics" in terminal.shown()) == (first is not None)
    assert first is None or shown[0].startswith(first)
    assert "NO_COLOR" not in env or b"\x1b" not in terminal.written


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
def test_long_values_are_folded_at_blanks_on_a_terminal() -> None:
    terminal = Terminal(["-m", "dsv4cli", "plan", "tiny"], columns=50, rows=60)
    assert terminal.wait_for_end() == 0
    lines = terminal.lines()
    terminal.close()
    first = next(number for number, line in enumerate(lines) if line.startswith("decode"))
    assert lines[first:first + 2] == ["decode   not known: so small a model waits for its",
                                      "         calls more than for its weights"]
