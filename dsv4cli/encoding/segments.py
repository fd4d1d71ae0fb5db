"""A rendered prompt: pieces of text, and control tokens between them.

The two never mix. A `Control` is placed by the template and becomes one id; a `Text` is whatever somebody wrote and is
encoded without the added-token table, so a user who types a control token's spelling gets its letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """Ordinary text, kept to the byte."""

    text: str


@dataclass(frozen=True)
class Control:
    """A control token by its spelling, for example `<｜User｜>`."""

    text: str


Segment = Text | Control


@dataclass
class Rendered:
    """A prompt under construction and, once rendered, its segments: neighbouring texts are one segment."""

    segments: list[Segment] = field(default_factory=list)

    def control(self, spelling: str) -> None:
        self.segments.append(Control(spelling))

    def text(self, text: str) -> None:
        """Appends text. Joined to the text before it: byte-pair merges may run across the border."""
        if not text:
            return
        if self.segments and isinstance(last := self.segments[-1], Text):
            self.segments[-1] = Text(last.text + text)
        else:
            self.segments.append(Text(text))

    def marked(self, text: str, spellings: tuple[str, ...]) -> None:
        """Appends the template's own text, in which each of `spellings` is a control token."""
        for piece in re.split("(" + "|".join(map(re.escape, spellings)) + ")", text):
            if piece in spellings:
                self.control(piece)
            else:
                self.text(piece)

    def __str__(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @property
    def control_ranges(self) -> list[tuple[int, int]]:
        """Half-open character ranges of `str(self)` that are control tokens."""
        ranges, at = [], 0
        for segment in self.segments:
            end = at + len(segment.text)
            if isinstance(segment, Control):
                ranges.append((at, end))
            at = end
        return ranges
