"""Drawing a download or a check: one total bar and the current files on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsv4cli import console
from dsv4cli.console import in_bytes
from dsv4cli.errors import UsageError

if TYPE_CHECKING:
    from dsv4cli.registry.download import State

EVERY = 10.0  # seconds between two plain lines
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


def watch(states: Iterator[State], what: str, quiet: bool = False) -> State:
    """Runs a transfer (of one state at least) to its end, drawing it on stderr; its last state."""
    if quiet:
        return list(states)[-1]
    return _bars(states, what) if console.coloured(sys.stderr) else _lines(states, what)


def duration(seconds: float) -> str:
    """7384 -> '2 h 3 min'."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def rate_limit(text: str | None) -> float | None:
    """'20M' -> 20e6 bytes a second. Raises UsageError."""
    if text is None:
        return None
    number = text.lower().removesuffix("/s").removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmg" else ""
    try:
        rate = float(number.removesuffix(unit)) * UNITS[unit]
    except ValueError:
        rate = 0.0
    if not 1 <= rate < 1e15:
        raise UsageError(f"--limit-rate is {text!r}, but it must be bytes a second, like 500K, 20M or 1.5G.")
    return rate


def _lines(states: Iterator[State], what: str) -> State:
    next_line, said = time.monotonic() + EVERY, ""
    for state in states:
        waiting = next(iter(list(state.waiting.values())), "")
        if waiting and waiting != said:
            console.note(waiting)
        said = waiting
        if time.monotonic() >= next_line:
            next_line += EVERY
            console.note(f"{what}: {_summary(state)}")
    return state


def _summary(state: State) -> str:
    done, left = state.done, state.seconds_left
    share = 100 * done // state.total if state.total else 100
    rest = f", {duration(left)} left" if left is not None else ""
    files = f" ({', '.join(list(state.current)[:4])})" if state.current else ""
    rest += f", {state.beside}" if state.beside else ""
    return f"{share} %, {in_bytes(done)} of {in_bytes(state.total)}, {in_bytes(int(state.rate))}/s{rest}{files}"


def _bars(states: Iterator[State], what: str) -> State:
    from rich.progress import BarColumn, Progress, TextColumn

    name, told = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[told]}", markup=False)
    with Progress(name, BarColumn(bar_width=None), told, console=console.err(), transient=True, expand=True) as bar:
        whole = bar.add_task(what, total=None, told="")
        shown: dict[str, Any] = {}
        for state in states:
            _draw(bar, whole, shown, state)
    return state


def _draw(bar: Any, whole: Any, shown: dict[str, Any], state: State) -> None:
    left = state.seconds_left
    rest = f"  {duration(left)} left" if left is not None else ""
    rest += f"  {state.beside}" if state.beside else ""
    told = f"{in_bytes(state.done)} of {in_bytes(state.total)}  {in_bytes(int(state.rate))}/s{rest}"
    bar.update(whole, total=max(state.total, 1), completed=state.done, told=told)
    current = dict(state.current)
    for path in [path for path in shown if path not in current]:
        bar.remove_task(shown.pop(path))
    for path, (here, size) in current.items():
        if path not in shown:
            shown[path] = bar.add_task(f"  {path}", told="")
        waiting = state.waiting.get(path, "")
        bar.update(shown[path], total=max(size, 1), completed=here, told=waiting or in_bytes(size))
