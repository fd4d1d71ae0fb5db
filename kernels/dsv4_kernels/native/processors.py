"""Which processors to compute on: one per physical core, all on one NUMA node while they suffice."""

from __future__ import annotations

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system")


def physical_cores() -> int:
    """Cores this process may use, of the largest node; two threads of one core count once (the second slows the first)."""
    return max(len(cores) for cores in _nodes())


def places(count: int) -> list[int]:
    """A processor for each of `count` threads; none when there are more threads than physical cores."""
    cores = [cpu for node in sorted(_nodes(), key=len, reverse=True) for cpu in node]
    return cores[:count] if count <= len(cores) else []


def _nodes() -> list[list[int]]:
    """Per NUMA node the first processor of each physical core that this process may use."""
    allowed = _allowed()
    cores: dict[int, int] = {}
    for cpu in sorted(allowed):
        siblings = _list(TOPOLOGY / f"cpu/cpu{cpu}/topology/thread_siblings_list") or [cpu]
        cores.setdefault(min(s for s in siblings if s in allowed or s == cpu), cpu)
    firsts = sorted(cores.values())
    nodes = [[cpu for cpu in firsts if cpu in _list(path / "cpulist")] for path in TOPOLOGY.glob("node/node[0-9]*")]
    return [node for node in nodes if node] or [firsts]


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _list(path: Path) -> list[int]:
    """The kernel's "0-3,8" as numbers; empty where the file does not exist."""
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
