"""The header of a safetensors file: eight bytes of length, then JSON with a dtype, a shape and two offsets a tensor."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, TypeGuard

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.info import DAMAGED, TensorInfo, check_layout

LENGTH = 8  # bytes of the length that every file begins with
LARGEST_HEADER = 100_000_000  # the format's own limit
MOST_DIMENSIONS = 8
LARGEST = 1 << 63  # of a dimension or an offset
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def read(path: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor. Raises CorruptFile with the file's name and the numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(LENGTH)
        return parse(head + file.read(length_of(head, size, path)), size, path)


def length_of(head: bytes, size: int, path: Path) -> int:
    """How many bytes the JSON has that begins behind the first eight, which are `head`, of a file of `size` bytes."""
    length: int = struct.unpack("<Q", head)[0] if len(head) == LENGTH else 0
    if len(head) < LENGTH or length > min(LARGEST_HEADER, size - LENGTH):
        raise CorruptFile(f"{path}: a header of {length} bytes does not fit a file of {size}.", "Get the file again.")
    return length


def parse(head: bytes, size: int, path: Path) -> dict[str, TensorInfo]:
    """As `read`, of the first bytes of a file that need not be here."""
    entries = _parse(head[LENGTH:], path)
    entries.pop("__metadata__", None)
    begin = len(head)
    tensors = {name: _tensor(name, entry, path, begin) for name, entry in entries.items()}
    check_layout(tensors.values(), begin, size)
    covered = sum(info.nbytes for info in tensors.values())  # the format allows no holes, where anything could hide
    if covered != size - begin:
        raise CorruptFile(f"{path}: tensors cover {covered} of {size - begin} data bytes.", "Get the file again.")
    return tensors


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: the header is not valid JSON ({error}).", DAMAGED) from None
    if not isinstance(entries, dict):
        raise CorruptFile(f"{path}: the header is not a JSON object.", DAMAGED)
    return entries


def _tensor(name: str, entry: Any, path: Path, begin: int) -> TensorInfo:
    where = f"{path}: {name}"
    if not isinstance(entry, dict):
        raise CorruptFile(f"{where} is described by {entry!r}.", DAMAGED)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise CorruptFile(f"{where} has the unknown type {dtype!r}.", DAMAGED)
    if not _counts(shape, MOST_DIMENSIONS):
        raise CorruptFile(f"{where} has the shape {shape!r}.", DAMAGED)
    if not _counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptFile(f"{where} has the offsets {offsets!r}.", DAMAGED)
    nbytes = math.prod(shape) * SIZES[dtype]
    if nbytes != offsets[1] - offsets[0]:
        raise CorruptFile(f"{where} {dtype}{shape} takes {nbytes} bytes, but has {offsets[1] - offsets[0]}.", DAMAGED)
    return TensorInfo(name, dtype, tuple(shape), path, begin + offsets[0], nbytes)


def _counts(value: Any, most: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= most and all(type(v) is int and 0 <= v < LARGEST for v in value)
