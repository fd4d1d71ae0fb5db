"""A conversion that kills itself, in a process of its own: python killed.py SOURCE OUTPUT POINT COUNT.

POINT is a place in the work, and COUNT how often it is passed before the process ends as by kill -9: no handler runs, no buffer
is emptied. Exit code 0 means that the conversion came to its end first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4_quant import convert, drafts, journal, recipe
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import Plan, make_plan

PART_SIZE = 300_000


def small_plan(source: Path, output: Path) -> Plan:
    """In several files, with types that every step of a conversion is needed for."""
    rules = recipe.rules_of({"experts": "q8_0", "down": "mxfp4", "embed": "f16"})
    return make_plan(read_header(source), output, recipe.named("mxfp4"), Origin("small"), changes=rules, part_size=PART_SIZE)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(owner: Any, name: str, count: int) -> None:
    """Replaces owner.name by the same, and death when it returns for the `count`-th time."""
    original, calls = getattr(owner, name), iter(range(count - 1))

    def passed(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if next(calls, None) is None:
            kill()
        return result

    setattr(owner, name, passed)


def tear_after(count: int) -> None:
    """Dies while the `count`-th line of the journal is written, with half of it on the disk."""
    original, calls = journal.Journal._append, iter(range(count - 1))

    def torn(self: journal.Journal, text: str) -> None:
        if next(calls, None) is not None:
            original(self, text)
            return
        self._file.write(text[: len(text) // 2].encode())
        self._file.flush()
        kill()

    journal.Journal._append = torn  # type: ignore[method-assign]


POINTS: dict[str, Callable[[int], None]] = {
    "wiped": lambda count: kill_after(journal.Journal, "wipe", count),
    "created": lambda count: kill_after(drafts.Drafts, "create", count),
    "written": lambda count: kill_after(drafts.Drafts, "write", count),
    "noted": lambda count: kill_after(journal.Journal, "add", count),
    "torn": tear_after,
    "finished": lambda count: kill_after(journal.Journal, "finish", count),
    "renamed": lambda count: kill_after(os, "replace", count),
    "removed": lambda count: kill_after(journal.Journal, "remove", count),
}


def main(source: str, output: str, point: str, count: str) -> None:
    convert.COMMIT_SECONDS = 0.0
    POINTS[point](int(count))
    plan = small_plan(Path(source), Path(output))
    convert.convert(plan, open_source(source), workers=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
