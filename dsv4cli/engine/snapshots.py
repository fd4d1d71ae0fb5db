"""The shelf of snapshots that a session can go back to.

V4's state cannot be trimmed: the window is a ring that has overwritten its past, and the compressors carry half-filled
groups. So a session that must go back restores the nearest snapshot and recomputes from there. The shelf is bounded in
number and bytes; when it is full, the snapshot goes that is cheapest to live without: the one with the fewest tokens
between it and the snapshot before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dsv4cli.model.state import Snapshot


@dataclass(frozen=True)
class Mark:
    """A place on the timeline: the state after `position` tokens, and the logits [vocab] of the last of them."""

    position: int
    snapshot: Snapshot
    logits: Tensor

    @cached_property
    def nbytes(self) -> int:
        return self.snapshot.nbytes + self.logits.nbytes


class Shelf:
    """Marks in order of position, at most `most` of them and `most_bytes` bytes; the newest always stays."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._marks: list[Mark] = []

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[Mark]:
        return iter(self._marks)

    @property
    def nbytes(self) -> int:
        return sum(mark.nbytes for mark in self._marks)

    def put(self, mark: Mark) -> None:
        """Marks are made at the end of the timeline, so each lies beyond all others."""
        self._marks.append(mark)
        while len(self._marks) > 1 and (len(self._marks) > self._most or self.nbytes > self._most_bytes):
            del self._marks[self._cheapest()]

    def holds(self, position: int) -> bool:
        return any(mark.position == position for mark in self._marks)

    def forget_after(self, position: int) -> None:
        """Drops the marks of a future that did not happen."""
        self._marks = [mark for mark in self._marks if mark.position <= position]

    def newest(self) -> Mark | None:
        return self._marks[-1] if self._marks else None

    def clear(self) -> None:
        self._marks = []

    def _cheapest(self) -> int:
        before = [0, *(mark.position for mark in self._marks)]
        return min(range(len(self._marks) - 1), key=lambda i: self._marks[i].position - before[i])
