"""Where the seconds go: on the prompt and on decoding. The consumer's own time between two records is nobody's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds so far; counts only inside `with clock.prompt():` and `with clock.decode():`."""

    def __init__(self) -> None:
        self.prompt_seconds = 0.0
        self.decode_seconds = 0.0

    @contextmanager
    def prompt(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.prompt_seconds += time.perf_counter() - start

    @contextmanager
    def decode(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.decode_seconds += time.perf_counter() - start


def rate(count: int, seconds: float) -> float:
    """Per second; 0 when nothing was counted."""
    return count / seconds if count > 0 and seconds > 0 else 0.0
