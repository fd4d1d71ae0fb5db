"""Files as tensors of bytes, without a copy."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor


def map_file(path: Path) -> Tensor:
    """uint8 [file size], a read-only shared map: its pages stay the page cache's and count as nobody's memory.

    A private writable map would silence torch's warning by itself, but the kernel books it against memory, and a model larger
    than RAM could not be opened.
    """
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(view, dtype=torch.uint8)


def typed_view(file: Tensor, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Bytes offset .. offset + nbytes as a flat tensor of `dtype`; copied only where the file does not align them."""
    raw = file[offset : offset + nbytes]
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)
