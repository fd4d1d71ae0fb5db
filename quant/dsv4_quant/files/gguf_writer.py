"""The header of a GGUF, made before any of its data: every tensor's size follows from its shape and type.

What `gguf_header` reads, this writes: magic, version, counts, keys, a name, shape, type and offset a tensor, padding.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv4_quant.errors import WrongUse
from dsv4_quant.files.gguf_header import ARRAY, MAGIC, SCALARS, STRING, TYPES

VERSION = 3
ALIGNMENT = 32
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
BLOCKS = {name: (block, block_bytes) for name, block, block_bytes in TYPES.values()}
KINDS = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": STRING, "u64": 10, "i64": 11,
    "f64": 12,
}  # fmt: skip


class Entry(NamedTuple):
    """A key-value pair. `kind` is a name in KINDS, or one in brackets for an array: "u32", "[str]"."""

    key: str
    kind: str
    value: Any


class Place(NamedTuple):
    """A tensor of the file: shape outermost first, offset from the beginning of the data."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int


def row_bytes(type: str, columns: int) -> int:
    """Bytes of a row. `columns` must be a multiple of the type's block."""
    block, block_bytes = BLOCKS[type]
    return columns // block * block_bytes


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(entries: Sequence[Entry], places: Sequence[Place]) -> bytes:
    """Everything before the data, padded to where the data begins."""
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(places), len(entries)))
    for entry in entries:
        out += _entry(entry)
    for place in places:
        out += _text(place.name) + struct.pack("<I", len(place.shape))
        out += b"".join(struct.pack("<Q", size) for size in reversed(place.shape))
        out += struct.pack("<IQ", NUMBERS[place.type], place.offset)
    return bytes(out.ljust(aligned(len(out)), b"\0"))


def fill_text(path: Path, key: str, text: str) -> None:
    """Writes `text` over the value of a text key that was reserved as blanks, in place; nothing else of the file moves.

    Raises WrongUse where the file has no such key, or less room than `text` takes.
    """
    head = _text(key) + struct.pack("<I", STRING)
    data = text.encode()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        at = view.find(head)
        if at < 0:
            raise WrongUse(f"{path} has no key {key}.", "Only files that dsv4 quantize wrote have room for it.")
        (room,) = struct.unpack_from("<Q", view, at + len(head))
        if len(data) > room:
            raise WrongUse(f"{path}: {key} has room for {room} bytes, not for {len(data)}.", "Shorten the text.")
        begin = at + len(head) + 8
        view[begin : begin + room] = data.ljust(room)


def _entry(entry: Entry) -> bytes:
    key, kind, value = entry
    if not kind.startswith("["):
        return _text(key) + struct.pack("<I", KINDS[kind]) + _value(kind, value)
    inner = kind[1:-1]
    head = _text(key) + struct.pack("<IIQ", ARRAY, KINDS[inner], len(value))
    return head + _values(inner, value)


def _value(kind: str, value: Any) -> bytes:
    return _text(value) if kind == "str" else struct.pack("<" + SCALARS[KINDS[kind]], value)


def _values(kind: str, values: Iterable[Any]) -> bytes:
    if kind == "str":
        return b"".join(map(_text, values))
    numbers = list(values)
    return struct.pack(f"<{len(numbers)}{SCALARS[KINDS[kind]]}", *numbers)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data
