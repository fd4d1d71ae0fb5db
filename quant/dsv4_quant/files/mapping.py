"""Files as tensors of bytes, without a copy."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dsv4_quant.errors import CorruptFile

FAULT_AROUND = 1 << 16  # bytes that Linux maps at once where one of them is touched; a multiple of any page
LEAST_ADVISED, MOST_ADVISED = 1 << 17, 1 << 21  # bytes that a request for reading ahead is surely heard for, and gains by
_OPEN: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # maps in use, by where they begin in memory


def map_file(path: Path) -> Tensor:
    """uint8 [file size], a read-only shared map: its pages stay the page cache's and count as nobody's memory.

    A private writable map would silence torch's warning by itself, but the kernel books it against memory, and a model larger
    than RAM could not be opened. Raises CorruptFile for an empty file.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CorruptFile(f"{path} is empty.", "Get it again, or wait until it is written.") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        mapped = torch.frombuffer(view, dtype=torch.uint8)
    _OPEN[mapped.data_ptr()] = view
    return mapped


def forget(view: Tensor) -> None:
    """Lets go of the pages behind a piece of a mapped file, which is not needed again: they no longer count as our memory.

    Neighbours that were mapped along with them go too. The page cache keeps all, so whoever does need them pays little. Other
    tensors, and systems that cannot, are left alone.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin, end = view.data_ptr(), view.data_ptr() + view.nbytes
    for base, file in list(_OPEN.items()):
        if base <= begin and end <= base + len(file):
            first = (begin - base) // FAULT_AROUND * FAULT_AROUND
            last = min(-(-(end - base) // FAULT_AROUND) * FAULT_AROUND, len(file))
            file.madvise(mmap.MADV_DONTNEED, first, last - first)


def typed_view(file: Tensor, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Bytes offset .. offset + nbytes as a flat tensor of `dtype`; copied only where the file does not align them."""
    raw = file[offset : offset + nbytes]
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def advised_at_once(path: Path) -> int:
    """Bytes that one request for reading a file ahead may ask for.

    Linux silently leaves out what exceeds both the read-ahead and the longest request of the disk. A multiple of any page.
    """
    device = os.stat(path).st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve() if hasattr(os, "major") else Path()
    for queue in (place / "queue", place.parent / "queue"):  # a partition's is that of its disk
        try:
            known = [int((queue / name).read_text()) * 1024 for name in ("read_ahead_kb", "max_sectors_kb")]
        except (OSError, ValueError):
            continue
        return max(LEAST_ADVISED, min(MOST_ADVISED, max(known) // FAULT_AROUND * FAULT_AROUND))
    return LEAST_ADVISED
