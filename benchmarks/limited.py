"""A control group with a limit of memory, for whoever wants to see what a program does in one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")


class Group:
    """A group below our own, of version 1 or 2 of the controller; it goes with `limited`."""

    def __init__(self, folder: Path, names: tuple[str, str, str]) -> None:
        self.folder = folder
        self._limit, self._peak, self._events = names

    def limit(self, nbytes: int) -> None:
        (self.folder / self._limit).write_text(str(nbytes))

    def join(self) -> None:
        """Moves the calling process in; for `preexec_fn`."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """The most bytes that were booked at once, the page cache's among them; 0 where the system does not tell."""
        return int(_text(self.folder / self._peak).strip() or 0)

    @property
    def killed(self) -> int:
        """Processes that the system killed for want of memory."""
        words = _text(self.folder / self._events).split()
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


@contextmanager
def limited(nbytes: int) -> Iterator[Group]:
    """A group of at most `nbytes`, whose processes have ended when this does. Raises OSError where none may be made."""
    group = _made()
    try:
        group.limit(nbytes)
        yield group
    finally:
        for _ in range(50):
            try:
                group.folder.rmdir()
                break
            except OSError:  # the last process is still being taken down
                time.sleep(0.1)


def _made() -> Group:
    name = f"dsv4-limited-{os.getpid()}"
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder = MOUNT / "memory" / path.strip("/") / name
            folder.mkdir()
            return Group(folder, ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"))
        if not controllers and (MOUNT / "cgroup.controllers").exists():
            folder = MOUNT / path.strip("/") / name
            folder.mkdir()
            if (folder / "memory.max").exists():
                return Group(folder, ("memory.max", "memory.peak", "memory.events"))
            folder.rmdir()
    raise OSError("no control group with a limit of memory can be made here")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
