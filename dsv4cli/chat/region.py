"""The part of the terminal that is still changing: a few lines at the bottom that are drawn again and again.

Everything above them is finished and belongs to the scrollback. Each change is one write: back to the first line of the
region, erase to the end of the screen, the lines that are now finished, the new region.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, RLock, Thread

from rich.console import Console, RenderableType

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
TICK = 0.2  # seconds between redraws while nothing arrives, so that clocks go on


class Region:
    """Draws on `console` what `content` returns (None: nothing), below whatever `above` has printed."""

    def __init__(self, console: Console, content: Callable[[], RenderableType | None]) -> None:
        self.lock = RLock()  # hold it while changing what `content` reads
        self._console, self._content = console, content
        self._height = 0
        self._closing = Event()
        self._clock = Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Region:
        self._console.file.write(HIDE_CURSOR)
        self.draw()
        self._clock.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Leaves the cursor below everything finished; what was still changing is gone."""
        self._closing.set()
        self._clock.join()
        self._write(self._rewind() + SHOW_CURSOR)

    def above(self, *finished: RenderableType) -> None:
        """Prints finished things for good, above the region, and draws the region anew."""
        with self.lock:
            self.draw(finished)

    def draw(self, finished: Sequence[RenderableType] = ()) -> None:
        with self.lock:
            self._console.size  # noqa: B018 - a resized window is noticed here
            with self._console.capture() as capture:
                for item in finished:
                    self._console.print(item)
            lines = self._lines()
            self._write(self._rewind() + capture.get() + "\n".join(lines))
            self._height = len(lines)

    def _lines(self) -> list[str]:
        """The region's lines: the last ones, if there are more than the screen has."""
        content = self._content()
        if content is None:
            return []
        with self._console.capture() as capture:
            self._console.print(content, width=max(10, self._console.width - 1))
        return capture.get().rstrip("\n").split("\n")[-max(1, self._console.height - 1):]

    def _rewind(self) -> str:
        up = f"\x1b[{self._height - 1}A" if self._height > 1 else ""
        self._height = 0
        return f"\r{up}\x1b[J"

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()

    def _tick(self) -> None:
        while not self._closing.wait(TICK):
            self.draw()


@contextmanager
def silent_keys() -> Iterator[None]:
    """Keys pressed inside the block are not echoed, where they would tear the region; the next prompt receives them."""
    try:
        import termios
    except ImportError:  # Windows: its console does not echo outside of input()
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(handle, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
