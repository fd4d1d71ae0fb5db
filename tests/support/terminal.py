"""A program in a real pseudo-terminal, with a screen that understands what it draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

import pexpect
import pyte

from tests.support.program import environment

PATIENCE = 30.0  # seconds; a wait ends as soon as its condition holds


class Terminal:
    """Starts `python ARGUMENTS` on a terminal of the given size. `lines()` is the screen, `history()` what scrolled off."""

    def __init__(self, arguments: Sequence[str], *, columns: int = 80, rows: int = 24,
                 env: Mapping[str, str] | None = None) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=5000)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        surroundings = environment(TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1", **(env or {}))
        self._child = pexpect.spawn(sys.executable, list(arguments), dimensions=(rows, columns), env=surroundings)

    def type(self, text: str) -> None:
        """Keys: Enter is \\r, Ctrl-C is \\x03, Ctrl-D is \\x04."""
        self._child.send(text)

    def wait_for(self, text: str) -> None:
        """Until the screen shows `text` somewhere."""
        self.wait_until(lambda: text in self.shown(), f"{text!r} never appeared")

    def wait_until(self, condition: Callable[[], bool], complaint: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"{complaint}; the screen:\n{self.shown()}"
            self._receive()

    def wait_for_prompt(self) -> None:
        """Until the last line with anything on it is an empty prompt."""
        self.wait_until(lambda: ([line for line in self.lines() if line] or [""])[-1] == ">>>", "the prompt never came back")

    def wait_for_end(self) -> int:
        """Until the program ends; its exit code."""
        end = time.monotonic() + PATIENCE
        while self._child.isalive():
            assert time.monotonic() < end, f"the program did not end; the screen:\n{self.shown()}"
            self._receive()
        self._receive()
        return self._child.exitstatus if self._child.exitstatus is not None else -int(self._child.signalstatus or 0)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    def shown(self) -> str:
        return "\n".join(self.lines()).rstrip()

    def history(self) -> list[str]:
        columns = range(self._screen.columns)
        return ["".join(line[column].data for column in columns).rstrip() for line in self._screen.history.top]

    def everything(self) -> str:
        """The scrollback and the screen, as somebody would read it by scrolling up."""
        return "\n".join([*self.history(), *self.lines()]).rstrip()

    def resize(self, columns: int, rows: int) -> None:
        self._child.setwinsize(rows, columns)
        self._screen.resize(rows, columns)

    def close(self) -> None:
        self._child.close(force=True)

    def _receive(self) -> None:
        try:
            data = self._child.read_nonblocking(65536, timeout=0.05)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.written += data
        self._stream.feed(data)
