"""Digests of files: of a file that is still growing, and of one that lies there."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Sequence
from io import RawIOBase
from pathlib import Path

PIECE = 1 << 22  # bytes read at once: threads that ask for the interpreter's lock often cost more than the hashing
LARGEST_GIT = 64 << 20  # files beyond are in LFS or xet, and known by their SHA-256


class Companion:
    """Hashes a file in the thread that writes it, which leaves the interpreter to other files' threads meanwhile. This takes
    no time but the hash's own; but one file alone would wait for it."""

    def __init__(self, size: int) -> None:
        """`size` is what the finished file will have, which git's digest begins with."""
        self._digests = Digests(size)

    def start(self) -> None:
        pass

    def grown(self, size: int, data: Sequence[memoryview] = ()) -> None:
        """`data` was appended."""
        for one in data:
            self._digests.update(one)

    def finish(self, size: int) -> tuple[str, str]:
        """`Digests.result` of all."""
        return self._digests.result()

    def abandon(self) -> None:
        pass


class Follower(threading.Thread):
    """Hashes a file while another thread appends to it, so that neither waits for the other.

    It reads what the file holds, not what came over the network: what is resumed is hashed from the first byte while the rest
    comes. A digest's inner state cannot be stored, so each run hashes from the start.
    """

    def __init__(self, path: Path, size: int) -> None:
        """`size` is what the finished file will have, which git's digest begins with."""
        super().__init__(daemon=True)
        self._path, self._digests = path, Digests(size)
        self._written = 0
        self._ended = self._abandoned = False
        self._news = threading.Condition()
        self._error: OSError | None = None

    def grown(self, size: int, data: Sequence[memoryview] = ()) -> None:
        """The file has `size` bytes now."""
        if size - self._written >= PIECE:
            with self._news:
                self._written = size
                self._news.notify()

    def finish(self, size: int) -> tuple[str, str]:
        """`Digests.result` of all `size` bytes; waits until they are hashed. Raises OSError if they cannot be read."""
        self._end(size, abandoned=False)
        if self._error:
            raise self._error
        return self._digests.result()

    def abandon(self) -> None:
        """Ends the thread, if it still runs; its result is not wanted."""
        self._end(self._written, abandoned=True)

    def _end(self, size: int, abandoned: bool) -> None:
        with self._news:
            self._written, self._ended, self._abandoned = size, True, abandoned
            self._news.notify()
        self.join()

    def run(self) -> None:
        at, buffer = 0, bytearray(PIECE)
        try:
            with self._path.open("rb", buffering=0) as file:
                while not self._abandoned and (goal := self._more_than(at)) > at:
                    while at < goal and not self._abandoned:
                        at += self._piece(file, memoryview(buffer)[: min(PIECE, goal - at)])
        except OSError as error:
            self._error = error

    def _more_than(self, at: int) -> int:
        """Waits for another piece; how far the file goes then (`at` when it has ended)."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._written - at >= PIECE)
            return self._written

    def _piece(self, file: RawIOBase, view: memoryview) -> int:
        got = file.readinto(view)
        if not got:
            raise OSError(errno.EIO, "became shorter while it was written", str(self._path))
        self._digests.update(view[:got])
        return got


class Digests:
    """The two digests by which the hub knows a file: SHA-256, and for files that are not too large git's SHA-1 of a blob."""

    def __init__(self, size: int) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False) if size <= LARGEST_GIT else None

    def update(self, data: memoryview) -> None:
        self._sha256.update(data)
        if self._git:
            self._git.update(data)

    def result(self) -> tuple[str, str]:
        """(SHA-256, git's blob id, or "" for a large file)."""
        return self._sha256.hexdigest(), self._git.hexdigest() if self._git else ""


def of_file(path: Path, progress: Callable[[int], None] = lambda nbytes: None) -> tuple[str, str]:
    """`Digests.result` of a file; `progress` hears how long each piece was."""
    digests, buffer = Digests(path.stat().st_size), bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digests.update(memoryview(buffer)[:got])
            progress(got)
    return digests.result()
