"""What `dsv4 quantize` shows: the plan by role before anything is read, and how far the work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsv4cli import console

if TYPE_CHECKING:
    from dsv4_quant.plan import Plan

MOST_LINES = 10  # of files written
PLAIN_SECONDS = 10.0  # between two lines where no bar can be drawn


def print_plan(plan: Plan) -> None:
    """A line a role: tensors, types before and after, bytes, bits a weight."""
    rows = [(row["role"], f"{row['tensors']:,}", row["from"], row["to"], console.in_bytes(row["bytes"]), f"{row['bits']:.2f}")
            for row in summary(plan)]
    console.table(("ROLE", "TENSORS", "FROM", "TO", "SIZE", "BITS"), rows, right=[1, 4, 5])
    files = f" in {len(plan.parts)} files" if len(plan.parts) > 1 else ""
    print(f"{plan.parts[0].path if files else plan.output}: {plan.nbytes:,} bytes{files}")


def print_json(plan: Plan) -> None:
    tensors = [{"name": target.name, "shape": target.shape, "from": target.stored, "to": target.type, "bytes": target.nbytes}
               for target in plan.targets]
    files = [{"path": part.path, "bytes": part.nbytes} for part in plan.parts]
    console.print_json({"roles": list(summary(plan)), "tensors": tensors, "files": files, "bytes": plan.nbytes})


def print_written(plan: Plan, seconds: float) -> None:
    """A line a file, and how long it took."""
    for part in plan.parts[:MOST_LINES]:
        console.note(f"{part.path}: {part.nbytes:,} bytes")
    if (more := len(plan.parts) - MOST_LINES) > 0:
        console.note(f"and {more} more")
    console.note(f"{seconds:.0f} s")


NAMES = {"gate_up": "experts gate, up", "down": "experts down", "shared": "shared experts", "embed": "embedding",
         "output": "head", "rest": "everything else"}


def summary(plan: Plan) -> Iterator[dict[str, Any]]:
    """The plan by role, and all of it; norms, mixers, routers and compressors are one role."""
    groups: dict[str, list[Any]] = {}
    for target in sorted(plan.targets, key=lambda target: target.slot == "rest"):
        groups.setdefault(NAMES.get(target.slot, target.slot), []).append(target)
    for name, targets in (*groups.items(), ("total", list(plan.targets))):
        nbytes, weights = sum(target.nbytes for target in targets), sum(target.weights for target in targets)
        yield {"role": name, "tensors": len(targets), "from": _kinds(targets, "stored"), "to": _kinds(targets, "type"),
               "bytes": nbytes, "bits": 8 * nbytes / weights}


def _kinds(targets: list[Any], which: str) -> str:
    """The types, the commonest first."""
    weights: dict[str, int] = {}
    for target in targets:
        kind = getattr(target, which)
        weights[kind] = weights.get(kind, 0) + target.weights
    return ", ".join(sorted(weights, key=lambda kind: -weights[kind]))


@contextmanager
def reporting(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal's stderr, a line now and then elsewhere."""
    if quiet or not console.coloured(sys.stderr):
        yield (lambda done, total, name: None) if quiet else _Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TransferSpeedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


class _Lines:
    """Progress for logs."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.said < PLAIN_SECONDS:
            return
        rate = (done - self.first) / (now - self.began)
        console.note(f"{100 * done / total:.0f} %  {name}  {rate / 1e9:.3f} GB/s  {(total - done) / max(rate, 1):.0f} s left")
        self.said = now
