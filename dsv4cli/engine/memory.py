"""The memory plan: what a model will need, what this machine has, and a refusal before the first byte is loaded.

Weights stay in the mapped file and are read through the page cache. They are counted in full all the same: a model
whose weights do not fit would read them from the disk again for every token. What a program may use is the smallest of
what the system has available and what the control groups around the process leave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4cli.console import in_bytes
from dsv4cli.errors import CapacityError, UsageError

DEFAULT_CONTEXT = 32768
SMALLEST_CONTEXT = 512  # shorter than this, a default context would not be worth opening the model for


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `available` is None where the system does not tell; then nothing is refused."""

    context: int  # tokens
    weights: int  # as stored, mapped from the file
    expanded: int  # float32 copies of small models
    state: int  # window, compressed entries and compressor state at a full context
    snapshots: int  # the most that a session may keep to go back to
    scratch: int  # the largest temporary tensors of a prompt chunk
    available: int | None

    @property
    def needed(self) -> int:
        return self.weights + self.expanded + self.state + self.snapshots + self.scratch

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available

    def demand_fit(self, name: str) -> None:
        """Raises CapacityError with both numbers if the plan asks for more than there is."""
        if not self.fits:
            raise CapacityError(
                f"{name} needs {in_bytes(self.needed)} of memory ({self.parts()}), "
                f"but only {in_bytes(self.available or 0)} are available.",
                "Choose a smaller --ctx, a smaller quantisation, or a machine with more memory.")

    def parts(self) -> str:
        named = {"weights": self.weights, "expanded weights": self.expanded,
                 f"state for {self.context} tokens": self.state, "snapshots": self.snapshots, "scratch": self.scratch}
        return ", ".join(f"{what} {in_bytes(size)}" for what, size in named.items() if size)


def plan_memory(name: str, *, ctx: int | None, model_ctx: int, weights: int, expanded: int, scratch: int,
                state_bytes: Callable[[int], int], available: int | None) -> MemoryPlan:
    """The plan for `ctx` tokens, or, with ctx None, for the longest default that fits (halving from DEFAULT_CONTEXT).

    model_ctx is the model's own maximum; state_bytes(tokens) prices the state, and snapshots
    may take as much again. Raises UsageError for a context the
    model does not have, CapacityError (both numbers) for one the machine does not have.
    """
    if ctx is not None and not 1 <= ctx <= model_ctx:
        raise UsageError(f"A context of {ctx} tokens was asked for, but {name} allows 1 to {model_ctx}.",
                         f"Choose --ctx between 1 and {model_ctx}.")

    def plan(tokens: int) -> MemoryPlan:
        state = state_bytes(tokens)
        return MemoryPlan(tokens, weights, expanded, state, state, scratch, available)

    chosen = plan(ctx or min(DEFAULT_CONTEXT, model_ctx))
    while ctx is None and not chosen.fits and chosen.context // 2 >= SMALLEST_CONTEXT:
        chosen = plan(chosen.context // 2)
    chosen.demand_fit(name)
    return chosen


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process may still use, None where nobody tells. Tests put another system at `root`."""
    known = [size for size in (_from_meminfo(root), *_from_cgroups(root)) if size is not None]
    if not known and root == Path("/"):
        known = _from_sysconf()
    return min(known, default=None)


def resident_bytes() -> int:
    """The process's resident memory, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def _from_meminfo(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _from_cgroups(root: Path) -> Iterator[int | None]:
    """What each control group around the process leaves: its limit, less what is used and cannot be reclaimed."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _around(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _around(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                               "total_inactive_file")


def _around(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int | None]:
    inner = mount / path.strip("/")
    for folder in (inner, *inner.parents):
        yield _left(folder, limit, usage, reclaimable)
        if folder == mount:
            return


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    most = _text(folder / limit).strip()
    if not most.isdigit():  # absent, or "max"
        return None
    used = int(_text(folder / usage).strip() or 0)
    counters = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    return max(0, int(most) - used + int(counters.get(reclaimable, 0)))


def _from_sysconf() -> list[int]:
    """Physical memory, where there is no /proc: most of it can be made available."""
    try:
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
