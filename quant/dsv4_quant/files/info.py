"""Where a tensor lies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dsv4_quant.errors import CorruptFile

DAMAGED = "The file is damaged or was made to do harm; get it again from its source."


class TensorInfo(NamedTuple):
    """A tensor's place: `nbytes` bytes from `offset` of `file`; `shape` is outermost first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def check_layout(tensors: Iterable[TensorInfo], begin: int, end: int) -> None:
    """Raises CorruptFile when tensors overlap or leave the bytes begin .. end of their file."""
    reached, before = begin, "the header"
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < reached:
            raise CorruptFile(
                f"{info.file}: {info.name} begins at byte {info.offset}, inside {before}, which ends at {reached}.",
                DAMAGED,
            )
        if info.offset + info.nbytes > end:
            raise CorruptFile(
                f"{info.file}: {info.name} ends at byte {info.offset + info.nbytes}, but the file has {end}.",
                "The file is truncated; get it again.",
            )
        reached, before = info.offset + info.nbytes, info.name
