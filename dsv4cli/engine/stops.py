"""Stop strings: text is let through as soon as it cannot be the beginning of one any more."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4cli.errors import UsageError


class StopStrings:
    """Feeds on the answer's text. `push` returns what is safe to show; `hit` is True once a stop string was completed.

    The stop string itself and everything after it are swallowed.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if any(not string for string in strings):
            raise UsageError("A stop string is empty.", "Give at least one character.")
        self._strings = tuple(strings)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        if self.hit or not self._strings:
            return "" if self.hit else text
        self._held += text
        completed = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        self.hit = bool(completed)
        return self._release(min(completed)[1] if completed else len(self._held) - self._doubtful())

    def flush(self) -> str:
        """The stream is over: what was held back was text after all (nothing, after a hit)."""
        return "" if self.hit else self._release(len(self._held))

    def _release(self, count: int) -> str:
        safe, self._held = self._held[:count], self._held[count:]
        return safe

    def _doubtful(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        begun = (n for string in self._strings for n in range(1, len(string)) if self._held.endswith(string[:n]))
        return max(begun, default=0)
