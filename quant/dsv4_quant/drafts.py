"""The files of an output while they are written: beside their place, under a temporary name, of full size from the start."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from dsv4_quant.errors import NotEnoughRoom
from dsv4_quant.files.folders import sync_folder
from dsv4_quant.files.gguf_header import read
from dsv4_quant.files.mapping import map_file
from dsv4_quant.formats import FORMATS
from dsv4_quant.plan import Part, Plan, Target
from dsv4_quant.quantize import NUMBERS

SUFFIX = ".part"


class Drafts:
    """The drafts of a plan's parts. Threads may write at the same time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._files: list[BinaryIO] = []
        self._lock = threading.Lock()

    def complete(self, renamed: bool) -> bool:
        """Whether every draft is there in full size; with `renamed` one may have its final name already."""
        return all(
            _size(draft_of(part)) == part.nbytes or (renamed and _size(part.path) == part.nbytes)
            for part in self.plan.parts
        )

    def check_room(self) -> None:
        """Raises NotEnoughRoom unless the disk can take what is not allocated yet."""
        folder = self.plan.output.parent
        free = shutil.disk_usage(folder).free
        needed = self.plan.nbytes - sum(_allocated(draft_of(part)) for part in self.plan.parts)
        if needed > free:
            raise NotEnoughRoom(
                f"The disk of {folder.absolute()} has {free:,} bytes free; {needed:,} are needed.",
                "Make room, write elsewhere with -o, or choose a smaller recipe.",
            )

    def create(self) -> None:
        """Makes the files: their header, and zeros to the end, which take no room yet."""
        for part in self.plan.parts:
            with draft_of(part).open("wb") as file:
                file.write(part.head)
                file.truncate(part.nbytes)
                os.fsync(file.fileno())

    def open(self) -> None:
        self._files = [draft_of(part).open("r+b", buffering=0) for part in self.plan.parts]

    def write(self, part: int, offset: int, data: Tensor) -> None:
        """uint8 bytes to their place in a part."""
        view = memoryview(data.numpy().data)
        with self._lock:
            self._files[part].seek(offset)
            while view:  # a raw file may take less than it is given
                view = view[self._files[part].write(view) :]

    def sync(self) -> None:
        """What was written is on the disk."""
        for file in self._files:
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def check(self) -> None:
        """Reads the headers back as anyone would, and the ends of every tensor: its numbers must be numbers."""
        for number, part in enumerate(self.plan.parts):
            path = draft_of(part)
            found, data = read(path).tensors, map_file(path)
            for target in (target for target in self.plan.targets if target.part == number):
                info = found[target.name]
                assert (info.offset, info.nbytes, info.shape) == (target.offset, target.nbytes, target.shape), target
                _check_ends(data[info.offset : info.offset + info.nbytes], target)

    def publish(self) -> None:
        """Gives the files their names; what has its name already stays."""
        for part in self.plan.parts:
            if draft_of(part).exists():
                os.replace(draft_of(part), part.path)
        sync_folder(self.plan.output.absolute().parent)


def draft_of(part: Part) -> Path:
    return part.path.with_name(part.path.name + SUFFIX)


def _check_ends(data: Tensor, target: Target) -> None:
    rows = data.view(target.experts * target.rows, -1)[[0, -1]]
    stored = rows.view(NUMBERS[target.type]) if target.type in NUMBERS else rows
    values = FORMATS[target.type].decode(stored, None)
    assert bool(values.isfinite().all()), f"{target.name} was written with values that are no numbers"


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _allocated(path: Path) -> int:
    """Bytes that a file takes on the disk, where the system says so."""
    return getattr(path.stat(), "st_blocks", 0) * 512 if path.is_file() else 0
