"""The files that weights are mapped from, which have to stay as they are: what was computed from others is not given out.

Renaming or deleting a file changes nothing, nor does putting another in its place: what is mapped stays. One that is cut
short, written to, or no longer readable cannot be recovered from, so the model must be opened again.
"""

from __future__ import annotations

import os
from pathlib import Path
from weakref import finalize

from torch import Tensor

from dsv4_kernels.native.faults import Watch
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import Source

HINT = "Get the file again or wait until it is written, check it with dsv4 verify, and open the model again."


class MappedFiles:
    """All files of a source, watched from now on."""

    def __init__(self, source: Source) -> None:
        self._files = [_MappedFile(path, mapped) for path, mapped in source.maps().items()]

    def demand_unchanged(self) -> None:
        """Raises CorruptFile if a file was changed or could not be read since it was mapped."""
        for file in self._files:
            file.demand_unchanged()


class _MappedFile:
    def __init__(self, path: Path, mapped: Tensor) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)  # names the file that is mapped whatever becomes of its name
        finalize(self, os.close, self._file)
        self._mapped = mapped  # which may not be unmapped while it is watched
        self._watch = Watch(mapped)
        self._time = os.fstat(self._file).st_mtime_ns

    def demand_unchanged(self) -> None:
        now, lost = os.fstat(self._file), self._watch.lost()
        if now.st_size < self._mapped.nbytes:
            raise CorruptFile(f"{self._path} was cut short while it was in use, from {self._mapped.nbytes} bytes to "
                              f"{now.st_size}.", HINT)
        if lost is not None:
            raise CorruptFile(f"{self._path} could not be read from byte {lost} on: its disk reported an error, or it was cut "
                              "short for a moment.", HINT)
        if now.st_mtime_ns != self._time:
            raise CorruptFile(f"{self._path} was written to while it was in use.", HINT)
