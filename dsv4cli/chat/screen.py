"""The chat's screen on a terminal: header, prompt, dim reasoning with a clock, answers as markdown, notes, errors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsv4cli import console
from dsv4cli.chat import markdown
from dsv4cli.chat.region import Region, silent_keys
from dsv4cli.chat.turn import View, describe_call, tokens
from dsv4cli.errors import Dsv4Error

if TYPE_CHECKING:
    from dsv4cli.engine.records import Token


class TerminalScreen:
    """Everything that the interactive chat draws. `read(continued)` returns a line typed by the user."""

    interactive = True

    def __init__(self, read: Callable[[bool], str], quiet: bool = False, drawn_on: Console | None = None) -> None:
        self._read, self._quiet = read, quiet
        self._console = drawn_on or console.out()

    def ask(self, continued: bool = False) -> str:
        """The next line typed. Raises EOFError (Ctrl-D) and KeyboardInterrupt (Ctrl-C)."""
        return self._read(continued)

    def header(self, facts: list[tuple[str, str]]) -> None:
        if not self._quiet:
            self._console.print(Text.from_ansi(console.panel("dsv4", facts, self._console.width)))
            self.note("/help lists the commands, Ctrl-C stops an answer, /bye leaves.\n")

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="note"))

    def table(self, rows: list[tuple[str, str]]) -> None:
        self._console.print(_grid(rows))

    def failed(self, error: Dsv4Error) -> None:
        self._console.print(Text.assemble(("error: ", "error"), error.message))
        if error.hint:
            self._console.print(Text.assemble(("hint: ", "hint"), error.hint))

    @contextmanager
    def answering(self) -> Iterator[View]:
        """A view that draws one answer; on leaving, what is unfinished is finished."""
        turn = _Turn(self._console, self._quiet)
        with silent_keys(), turn.region, console.notes_to(turn.remark):
            try:
                yield turn
            finally:
                turn.finish()
        self._console.print()


class _Turn:
    """One answer being drawn: the texts that are not finished yet, and a line with a clock."""

    def __init__(self, drawn_on: Console, quiet: bool) -> None:
        self.region = Region(drawn_on, self._content)
        self._quiet = quiet
        self._kind = ""
        self._prompt = ""
        self._tail = ""  # of the reasoning: an unfinished line; of the answer: an unfinished block
        self._blocks = 0
        self._thoughts = 0
        self._since = time.monotonic()

    def read(self, done: int, whole: int) -> None:
        with self.region.lock:
            self._prompt = f", {done} of {whole} tokens"

    def show(self, token: Token) -> None:
        with self.region.lock:
            if token.kind != self._kind:
                self._close_part()
                self._kind = token.kind
                if not self._thoughts:
                    self._since = time.monotonic()  # the clock of the thinking begins after the reading
            if token.kind == "reasoning" and token.id is not None:
                self._thoughts += 1
            if token.kind != "tool_call":
                self._tail += console.visible(token.text)
            self._settle()
            if token.tool_calls:
                self.region.above(*(Text(describe_call(call), style="hint") for call in token.tool_calls))

    def remark(self, text: str) -> None:
        """What somebody says about the machine meanwhile."""
        self.region.above(Text(text, style="note"))

    def finish(self) -> None:
        with self.region.lock:
            self._close_part()
            self._kind = "done"

    def _settle(self) -> None:
        """Prints for good what can no longer change."""
        if self._kind == "reasoning":
            done, newline, self._tail = self._tail.rpartition("\n")
            if newline and not self._quiet:
                self.region.above(Text(done, style="thought"))
                return
        elif self._kind == "answer":
            done, self._tail = markdown.split(self._tail)
            if done:
                self.region.above(*self._spaced(done))
                return
        self.region.draw()

    def _close_part(self) -> None:
        rest, self._tail = self._tail, ""
        if self._kind == "reasoning":
            thought = [Text(rest, style="thought")] if rest and not self._quiet else []
            self.region.above(*thought, Text(f"thought for {self._clock()}\n", style="note"))
        elif rest.strip():
            self.region.above(*self._spaced(rest))

    def _spaced(self, text: str) -> list[RenderableType]:
        self._blocks += 1
        return [*([Text()] if self._blocks > 1 else []), markdown.Block(text)]

    def _content(self) -> RenderableType | None:
        with self.region.lock:
            if self._kind == "":
                return Text(f"reading… {time.monotonic() - self._since:.0f} s{self._prompt}", style="note")
            if self._kind == "reasoning":
                tail = [Text(self._tail, style="thought")] if self._tail and not self._quiet else []
                return Group(*tail, Text(f"thinking… {self._clock()}", style="note"))
            if self._kind == "tool_call":
                return Text("calling a tool…", style="note")
            return Group(*self._preview()) if self._tail.strip() else None

    def _preview(self) -> list[RenderableType]:
        return [*([Text()] if self._blocks else []), markdown.Block(self._tail)]

    def _clock(self) -> str:
        return f"{time.monotonic() - self._since:.0f} s, {tokens(self._thoughts)}"


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="name", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), Text(value))
    return grid
