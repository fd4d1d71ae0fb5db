"""What of a long piece of work is surely done, in a file that survives whatever kills the program.

The first line says what work it is; each further one names pieces that were flushed to the disk before the line was written, and
ends with a checksum, so that half a line counts as none.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from dsv4_quant.errors import WrongUse

try:
    import fcntl
except ImportError:  # Windows: two programs at the same output are not noticed there
    fcntl = None  # type: ignore[assignment]

MAGIC = "dsv4-journal-1"
COMPLETE = "complete"


class Journal:
    """An open journal, held by this program alone. `done` has the numbers of finished pieces."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, without believing it yet. Raises WrongUse while another program holds it."""
        self.path = path
        self.done: set[int] = set()
        self.complete = False
        self._file = path.open("ab+")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise WrongUse(
                    f"Another program is writing {path.stem}.", "Wait for it, or choose another output."
                ) from None

    def resume(self, work: str) -> bool | None:
        """True if the file speaks of `work`, whose finished pieces are then known; None if it is empty or torn; else False."""
        self._file.seek(0)
        head, *lines = self._file.read().split(b"\n")
        if not lines or not head.startswith(MAGIC.encode()):
            return None
        if head.decode() != f"{MAGIC} {work}":
            return False
        good = len(head) + 1
        for line in lines[:-1]:  # behind the last newline is nothing, or half a line
            text, _, check = line.decode("ascii", "replace").rpartition(" ")
            if check != _checksum(text):
                break
            good += len(line) + 1
            self._take(text)
        self._file.truncate(good)
        return True

    def wipe(self) -> None:
        """Forgets all. Until `begin` nothing can be resumed."""
        self.done, self.complete = set(), False
        self._file.truncate(0)
        os.fsync(self._file.fileno())

    def begin(self, work: str) -> None:
        """Starts to keep the journal of `work`, whose files are ready to be written."""
        self._append(f"{MAGIC} {work}\n")

    def add(self, pieces: Iterable[int]) -> None:
        """Notes pieces whose bytes are on the disk."""
        text = " ".join(_ranges(sorted(pieces)))
        if text:
            self._append(f"{text} {_checksum(text)}\n")
            self._take(text)

    def finish(self) -> None:
        """Notes that every piece is done and the files get their names."""
        self._append(f"{COMPLETE} {_checksum(COMPLETE)}\n")
        self.complete = True

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def _append(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, text: str) -> None:
        if text == COMPLETE:
            self.complete = True
            return
        for word in text.split():
            first, _, last = word.partition("-")
            self.done.update(range(int(first), int(last or first) + 1))


def _ranges(numbers: list[int]) -> list[str]:
    """ "3-7", "9": runs of neighbours."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
