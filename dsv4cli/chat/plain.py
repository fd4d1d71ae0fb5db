"""Answers without a terminal: text to stdout as it comes, reasoning and everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsv4cli import console
from dsv4cli.chat.turn import View, describe_call
from dsv4cli.errors import Dsv4Error

if TYPE_CHECKING:
    from dsv4cli.engine.records import Token


class PlainTurn:
    """Writes one answer. Both streams end with a line end, whatever happens."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._kind = ""
        self._line_open = False

    def read(self, done: int, whole: int) -> None:
        """Silence: the text begins when it begins."""

    def show(self, token: Token) -> None:
        if token.tool_calls:
            self._begin("calls")
            for call in token.tool_calls:
                print(describe_call(call), file=sys.stderr)
        if token.text and token.kind != "tool_call" and not (self._quiet and token.kind == "reasoning"):
            self._begin(token.kind)
            self._write(token.kind, token.text)

    def close(self) -> None:
        self._begin("")

    def _begin(self, kind: str) -> None:
        if kind != self._kind and self._line_open:
            print(file=sys.stderr if self._kind == "reasoning" else sys.stdout, flush=True)
            self._line_open = False
        self._kind = kind

    def _write(self, kind: str, text: str) -> None:
        stream = sys.stderr if kind == "reasoning" else sys.stdout
        shown = console.visible(text) if stream.isatty() else text
        if kind == "reasoning" and console.coloured(stream):
            shown = f"\x1b[2m{shown}\x1b[22m"
        print(shown, end="", file=stream, flush=True)
        self._line_open = not text.endswith("\n")


class PlainScreen:
    """The chat's screen when stdin or stdout is not a terminal: a question per line, nothing drawn."""

    def __init__(self, quiet: bool) -> None:
        self.interactive = sys.stdin.isatty()
        self._quiet = quiet
        self._lines = console.stdin_lines()

    def ask(self, continued: bool = False) -> str:
        """The next line of stdin. Raises EOFError after the last, UsageError if it is not UTF-8."""
        if self.interactive:
            print("... " if continued else ">>> ", end="", file=sys.stderr, flush=True)
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    def header(self, facts: list[tuple[str, str]]) -> None:
        """To somebody who types; whoever pipes questions wants the answers alone."""
        if self.interactive:
            self.table([*facts, ("", "/help lists the commands, Ctrl-C stops an answer, /bye leaves.")])

    def note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def table(self, rows: list[tuple[str, str]]) -> None:
        for line in console.aligned(rows):
            self.note(line)

    def failed(self, error: Dsv4Error) -> None:
        console.report(error.message, error.hint)

    @contextmanager
    def answering(self) -> Iterator[View]:
        turn = PlainTurn(self._quiet)
        try:
            yield turn
        finally:
            turn.close()
