"""The folder of a model on its way in: verified files under their own names, and parts under names that tell their digest.

A part is called PATH.DIGEST.part, so bytes of another revision are never mistaken for a beginning of this one. A journal
says which files were verified; a file that it does not mention, or with another digest, is taken for a part again and hashed.
Every step is a rename or an append, so the process may be killed between any two of them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv4cli.errors import CapacityError
from dsv4cli.registry.hashing import Companion, Follower
from dsv4cli.registry.hub import KEPT, RemoteFile

JOURNAL = "journal.json"
BATCH, MOST_PENDING = 1 << 20, 512  # bytes, and pieces of any size, that are written at once


class Incoming:
    """`folder` is made when something is written. Methods raise CapacityError (exit 3) for a disk that refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._verified: dict[str, dict[str, str]] = {}
        with suppress(OSError, ValueError, AttributeError):
            entries = json.loads((folder / JOURNAL).read_text(encoding="utf-8")).items()
            self._verified = {path: entry for path, entry in entries if isinstance(entry, dict)}

    def final(self, file: RemoteFile) -> Path:
        return self.folder / file.path

    def part(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.path}.{file.digest[:16]}.part"

    def has(self, file: RemoteFile) -> bool:
        """Whether the file is here and verified."""
        entry = self._verified.get(file.path)
        return entry is not None and entry.get("digest") == file.digest and _size(self.final(file)) == file.size

    def present(self, file: RemoteFile) -> int:
        """Bytes of the file that are here, verified or not."""
        return file.size if self.has(file) else min(_size(self.part(file)) or 0, file.size)

    def sha256(self, file: RemoteFile) -> str:
        """Of a verified file."""
        return self._verified[file.path]["sha256"]

    def prepare(self, file: RemoteFile) -> Path:
        """The file's part, with its folder made and what an earlier run left under the final name moved to it."""
        part = self.part(file)
        with writing(self.folder):
            part.parent.mkdir(parents=True, exist_ok=True)
            if _size(self.final(file)) == file.size and not part.exists():
                os.replace(self.final(file), part)  # killed between the rename and the journal: it is hashed again
        return part

    def adopt(self, file: RemoteFile, source: Path) -> None:
        """Takes a whole file from elsewhere on this disk as the part, without a copy; leaves it if that cannot be."""
        if self.present(file) < file.size and _size(source) == file.size:
            with suppress(OSError):
                part = self.part(file)
                part.parent.mkdir(parents=True, exist_ok=True)
                part.unlink(missing_ok=True)
                os.link(source.resolve(), part)

    def verified(self, file: RemoteFile, sha256: str) -> Path:
        """Gives a part its final name, and writes that down."""
        with writing(self.folder):
            os.replace(self.part(file), self.final(file))
            with self._lock:
                self._verified[file.path] = {"digest": file.digest, "sha256": sha256}
                draft = self.folder / f"{JOURNAL}.new"
                draft.write_text(json.dumps(self._verified), encoding="utf-8")
                os.replace(draft, self.folder / JOURNAL)
        return self.final(file)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def clean(self, files: list[RemoteFile]) -> None:
        """Removes what belongs to none of `files`: parts and files of another revision."""
        wanted = {self.part(file) for file in files} | {self.final(file) for file in files} | {self.folder / JOURNAL}
        for path in self.folder.rglob("*"):
            if not path.is_dir() and path not in wanted:
                path.unlink(missing_ok=True)


class Part:
    """The growing file of one download, hashed as it grows. `here` is how many bytes it has. Raises CapacityError.

    What is appended is written a megabyte at a time. `alone`: no other file grows meanwhile.
    """

    def __init__(self, path: Path, size: int, alone: bool = False) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._path, self._size = path, size
        with writing(path.parent):
            self._descriptor = os.open(path, flags, 0o644)
        self.here = os.fstat(self._descriptor).st_size
        self._pending: list[memoryview] = []
        self._written = self.here
        self._hash = Follower(path, size) if alone or self.here else Companion(size)
        self._hash.grown(min(self.here, size))
        self._hash.start()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(CapacityError):  # then what ended it is worse, or is this
            self._flush()
        self._hash.abandon()
        os.close(self._descriptor)

    def append(self, data: bytes) -> None:
        self._pending.append(memoryview(data))
        self.here += len(data)
        if self.here - self._written >= BATCH or len(self._pending) >= MOST_PENDING:
            self._flush()

    def _flush(self) -> None:
        """Writes what is pending; what was not written after an error is forgotten."""
        data, self._pending = self._pending, []
        left = list(data)
        with writing(self._path.parent):
            while left:
                count = _written(self._descriptor, left)
                self._written += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if left:
                    left[0] = left[0][count:]
        self._hash.grown(self._written, data)

    def finish(self) -> tuple[str, str]:
        """`Digests.result` of the whole file, which is on the disk then."""
        self._flush()
        with writing(self._path.parent):
            os.fsync(self._descriptor)
            return self._hash.finish(self._size)


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turns what a disk refuses into CapacityError, whose message has the free space."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"The disk of {where} is full: {free(where) / 1e9:.1f} GB are left.",
                                f"Make room, or set DSV4_MODELS to a folder on a larger disk. {KEPT}") from None
        raise CapacityError(f"{error.filename or where} cannot be written: {error.strerror or error}.",
                            "Check the folder's permissions, or set DSV4_MODELS to a folder that can be written.") from None


def free(folder: Path) -> int:
    """Bytes free on the disk where `folder` is or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _written(descriptor: int, data: list[memoryview]) -> int:
    """Writes some of the data, from its beginning; how many bytes."""
    if hasattr(os, "writev"):
        return os.writev(descriptor, data)
    return os.write(descriptor, data[0])


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
