"""The two consoles: `out` for what was asked for (answers, tables, JSON), `err` for everything said about it.

Without a terminal, or with NO_COLOR, both write plain text: no escape sequence of any kind. rich is imported on first
use, because the help has to be faster than that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TextIO
from unicodedata import combining, east_asian_width

from dsv4_quant.units import in_bytes as in_bytes
from dsv4cli.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from rich.console import Console


def out() -> Console:
    return _console(sys.stdout)


def err() -> Console:
    return _console(sys.stderr)


@cache
def _console(stream: TextIO) -> Console:
    from rich.console import Console
    from rich.theme import Theme

    theme = Theme({"thought": "dim", "hint": "cyan", "error": "bold red", "note": "dim", "name": "bold"})
    plain = {} if coloured(stream) else {"color_system": None, "force_terminal": False}
    return Console(file=stream, theme=theme, highlight=False, soft_wrap=not stream.isatty(), **plain)  # type: ignore[arg-type]


def coloured(stream: TextIO) -> bool:
    """Whether escape sequences may be written there."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def visible(text: str) -> str:
    """The text with control characters made visible: what a model writes must not steer the terminal."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), "\ufffd") | {0x7F: "\u2421"}


def report(message: str, hint: str = "") -> None:
    """Prints an error and what to do about it, in two lines."""
    err().print(f"[error]error:[/] {_escaped(message)}")
    if hint:
        err().print(f"[hint]hint:[/] {_escaped(hint)}")


def note(text: str) -> None:
    """A remark on stderr, or where `notes_to` says."""
    if _takers:
        _takers[-1](text)
    else:
        err().print(_escaped(text), style="note")


_takers: list[Callable[[str], None]] = []


@contextmanager
def notes_to(take: Callable[[str], None]) -> Iterator[None]:
    """While this lasts, remarks go to whoever draws on the terminal and knows where there is room for them."""
    _takers.append(take)
    try:
        yield
    finally:
        _takers.remove(take)


def print_json(value: Any) -> None:
    """One JSON document on stdout; what JSON has no word for (paths) is written as text."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_json_line(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = (),
          indent: str = "") -> None:
    """Columns on stdout, a heading each; `right` has the columns of numbers. Nothing is cut or wrapped.

    (Drawn by hand: rich would be a third of the time that `dsv4 list` takes.)
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for index, row in enumerate((headings, *rows)):
        cells = [cell.rjust(width) if place in right else cell.ljust(width)
                 for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
        line = indent + "   ".join(cells).rstrip()
        print(bold(line) if index == 0 else line)


def pairs(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Names and values on stdout, aligned; on a terminal long values are folded at their blanks."""
    wide = max((len(name) for name, _ in rows), default=0)
    room = max(20, _width(sys.stdout) - len(indent) - wide - 2) if sys.stdout.isatty() else 0
    for name, value in rows:
        lines = wrap(value, room, break_long_words=False, break_on_hyphens=False) if room else []
        print(f"{indent}{bold(name.ljust(wide))}  {lines[0] if lines else value}")
        for line in lines[1:]:
            print(f"{indent}{' ' * wide}  {line}")


def _width(terminal: TextIO) -> int:
    """Columns of a terminal, 80 where it does not tell."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except OSError:
        return 80


def panel(title: str, rows: Sequence[tuple[str, str]], columns: int) -> str:
    """Names and values in a frame of at most so many columns, with escape sequences; lines that are too long are folded.

    (Drawn by hand, for rich takes longer to import than `run` has for its panel.)
    """
    wide = max(_columns(name) for name, _ in rows)
    room = max(8, columns - wide - 6)
    lines = [("" if number else name, text) for name, value in rows for number, text in enumerate(wrap(value, room) or [""])]
    inner = max(len(title) + 2, *(wide + 2 + _columns(text) for _, text in lines))
    framed = [f"\x1b[2m╭─ {title} {'─' * (inner - len(title) - 1)}╮\x1b[22m"]
    for name, text in lines:
        padded, rest = " " * (wide - _columns(name)), " " * (inner - wide - 2 - _columns(text))
        framed.append(f"\x1b[2m│\x1b[22m \x1b[1m{name}\x1b[22m{padded}  {text}{rest} \x1b[2m│\x1b[22m")
    return "\n".join([*framed, f"\x1b[2m╰{'─' * (inner + 2)}╯\x1b[22m"])


def show_panel(facts: Callable[[], Sequence[tuple[str, str]]], quiet: bool) -> None:
    """Says on a terminal's stderr what a command works with; elsewhere the facts are not even made."""
    if quiet or not sys.stderr.isatty():
        return
    if coloured(sys.stderr):
        text = panel("dsv4", facts(), _width(sys.stderr))
    else:
        text = "\n".join(aligned(facts()))
    print(text, file=sys.stderr, flush=True)


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of names and values, the values below each other."""
    wide = max((len(name) for name, _ in rows), default=0)
    return [f"{name.ljust(wide)}  {value}" for name, value in rows]


def _columns(text: str) -> int:
    """How wide a terminal shows `text`."""
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if coloured(sys.stdout) else text


@contextmanager
def working(text: str, quiet: bool) -> Iterator[None]:
    """Says on a terminal's stderr what takes a moment, and takes it back."""
    shown = coloured(sys.stderr) and not quiet
    if shown:
        print(f"\x1b[2m{text}\x1b[22m", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr for (done, all); None, so that nobody reports, when it would disturb."""
    if quiet or not coloured(sys.stderr):
        yield None
        return
    from rich.progress import Progress

    with Progress(console=err(), transient=True) as bar:
        task = bar.add_task("computing", total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Around work on `path` that the same command goes on with: turns Ctrl-C into Interrupted, having said so."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"Stopped. The same command goes on with {path}.")
        raise Interrupted("Stopped.") from None


def stdin_lines() -> Iterator[str]:
    """The lines of stdin without their ends, as they arrive. Raises UsageError for bytes that are not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield _decoded(line, f"line {number} of stdin").rstrip("\r\n")


def stdin_text() -> str:
    """All of stdin, "" if it is a terminal. Raises UsageError (exit 2) for bytes that are not UTF-8."""
    return "" if sys.stdin is None or sys.stdin.isatty() else _decoded(sys.stdin.buffer.read(), "stdin")


def demand_text(text: str, where: str) -> str:
    """The text itself. Raises UsageError for an argument that was not UTF-8 (Python smuggles it as surrogates)."""
    return _decoded(text.encode("utf-8", "surrogateescape"), where)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}.",
                         "Convert it first, for example with iconv -t UTF-8.") from None


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
