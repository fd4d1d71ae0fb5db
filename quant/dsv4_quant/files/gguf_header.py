"""The header of a GGUF: magic, version, counts, key-value pairs, then a name, shape, type and offset for each tensor.

Every count and length is checked against what is left of the file before it is believed.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_quant.errors import CorruptFile, UnsupportedModel
from dsv4_quant.files.info import DAMAGED, TensorInfo, check_layout

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_ALIGNMENT = 1 << 20
FIRST_READ = 1 << 24  # bytes, which hold most headers
LARGEST_HEADER = 1 << 28  # bytes; DeepSeek-V4's have ten million, and what they hold grows in memory
LARGEST_ARRAY = 1 << 24  # entries; the longest real one has a token an entry
MOST_DIMENSIONS = 4

# ggml's number of a type -> name, elements a block, bytes a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2), 26: ("i32", 1, 4), 27: ("i64", 1, 8),
    28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36),
}  # fmt: skip
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Part:
    """One file of a GGUF."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_parts(path: Path) -> list[Part]:
    """The file, or all files of a split model of which `path` is the first. Raises CorruptFile and UnsupportedModel."""
    first = read(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise CorruptFile(f"{path}: split.count is {count!r}.", DAMAGED)
    if count <= 1:
        return [first]
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[2]) != count or first.metadata.get("split.no", 0) != 0:
        raise CorruptFile(
            f"{path} is part of a model split into {count}.", f"Give its first part, ...-00001-of-{count:05d}.gguf."
        )
    parts = [first]
    for number in range(2, count + 1):
        other = path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
        if not other.is_file():
            raise CorruptFile(f"{path.parent} lacks {other.name} of {count} parts.", "Complete the download.")
        parts.append(read(other))
        if parts[-1].metadata.get("split.no") != number - 1:
            raise CorruptFile(f"{other} says it is part {parts[-1].metadata.get('split.no')}.", "Get the part again.")
    total = sum(len(part.tensors) for part in parts)
    if total != first.metadata.get("split.tensors.count", total):
        raise CorruptFile(
            f"{path}: the parts hold {total} tensors, not {first.metadata['split.tensors.count']}.",
            "Get the parts again.",
        )
    return parts


def read(path: Path) -> Part:
    """The header of one file. It is read and not mapped, so that a failing disk is an OSError and not a signal."""
    size = path.stat().st_size
    if size < 24:
        raise CorruptFile(f"{path} has {size} bytes; that is no GGUF.", "Get the file again.")
    wanted = FIRST_READ
    with path.open("rb") as file:
        while True:
            file.seek(0)
            asked = min(wanted, LARGEST_HEADER, size)
            data = file.read(asked)
            size = size if len(data) == asked else len(data)  # it has become shorter
            try:
                return _Reader(path, data, size).part()
            except _More:
                wanted *= 4


class _More(Exception):  # noqa: N818 - not an error: the header is longer than what was read
    """Ends a walk whose next step needs bytes that were not read."""


class _Reader:
    """Walks the header from its first byte. Raises _More where `view` ends before the file and before the longest header."""

    def __init__(self, path: Path, view: bytes, size: int) -> None:
        self.path, self.view, self.size, self.at = path, view, size, 0
        self.end = len(view)

    def part(self) -> Part:
        if self.view[:4] != MAGIC:
            raise CorruptFile(f"{self.path} is not a GGUF: it begins with {self.view[:4]!r}.", "Give a .gguf file.")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise UnsupportedModel(
                f"{self.path} is GGUF version {version}.", f"Versions {VERSIONS[0]} and {VERSIONS[1]} are read."
            )
        tensor_count, pair_count = self.number("Q"), self.number("Q")
        self.expect(tensor_count * 24 + pair_count * 12, f"{tensor_count} tensors and {pair_count} keys")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise CorruptFile(f"{self.path}: the key {key} occurs twice.", DAMAGED)
            metadata[key] = self.value(self.number("I"), key)
        places = [self.place() for _ in range(tensor_count)]
        return Part(self.path, metadata, self.tensors(places, self.alignment(metadata)))

    def alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get("general.alignment", 32)
        if not isinstance(found, int) or not 0 < found <= LARGEST_ALIGNMENT or found & (found - 1):
            raise CorruptFile(f"{self.path}: an alignment of {found!r}.", DAMAGED)
        return found

    def tensors(self, places: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
        begin = -(-self.at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in places:
            if name in found:
                raise CorruptFile(f"{self.path}: {name} occurs twice.", DAMAGED)
            if offset % alignment:
                raise CorruptFile(f"{self.path}: {name} lies at {offset}, not a multiple of {alignment}.", DAMAGED)
            dtype, block, block_bytes = self.kind(kind, name)
            if shape[-1] % block:
                raise CorruptFile(
                    f"{self.path}: rows of {name} have {shape[-1]} elements; {dtype} needs {block} a block.", DAMAGED
                )
            nbytes = math.prod(shape) // block * block_bytes
            found[name] = TensorInfo(name, dtype, shape, self.path, begin + offset, nbytes)
        check_layout(found.values(), begin, self.size)
        return found

    def kind(self, number: int, name: str) -> tuple[str, int, int]:
        if number not in TYPES:
            raise UnsupportedModel(
                f"{self.path}: {name} has ggml type {number}, which is not known here.", "Use another quantisation."
            )
        return TYPES[number]

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape (outermost first), type and offset."""
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise CorruptFile(f"{self.path}: {name} has {dimensions} dimensions.", DAMAGED)
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if not all(shape):
            raise CorruptFile(f"{self.path}: {name} has the shape {list(shape)}.", DAMAGED)
        return name, shape, self.number("I"), self.number("Q")

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise CorruptFile(f"{self.path}: the value of {key} has type {kind}.", DAMAGED)
        inner, count = self.number("I"), self.number("Q")
        if count > LARGEST_ARRAY:
            raise CorruptFile(f"{self.path}: {key} has {count} entries.", DAMAGED)
        if inner in SCALARS:
            return self.numbers(SCALARS[inner], count, key)
        if inner != STRING:
            raise CorruptFile(f"{self.path}: {key} is an array of type {inner}.", DAMAGED)
        return self.strings(count, key)

    def strings(self, count: int, key: str) -> list[str]:
        """As `string`, `count` times; written out because vocabularies and merges are a quarter of a million."""
        self.expect(count * 8, f"{key} with {count} entries")
        view, length_at, end = self.view, struct.Struct("<Q").unpack_from, self.end - 8
        found, at = [], self.at
        for _ in range(count):
            length = length_at(view, at)[0] if at <= end else self.size
            if length > end - at:
                self.at = at
                self.expect(8 + length, f"a text of {key}")
            found.append(view[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        self.at = at
        return found

    def numbers(self, code: str, count: int, key: str) -> list[Any]:
        self.expect(count * struct.calcsize(code), f"{key} with {count} entries")
        found = list(struct.unpack_from(f"<{count}{code}", self.view, self.at))
        self.at += count * struct.calcsize(code)
        return found

    def number(self, code: str) -> Any:
        length = struct.calcsize(code)
        self.expect(length, "a number")
        found = struct.unpack_from("<" + code, self.view, self.at)[0]
        self.at += length
        return found

    def string(self) -> str:
        length = self.number("Q")
        self.expect(length, f"a text of {length} bytes")
        raw = self.view[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    def expect(self, length: int, what: str) -> None:
        if length > self.end - self.at:
            if self.end < min(self.size, LARGEST_HEADER):
                raise _More
            limit = "file" if self.end == self.size else "longest header"
            raise CorruptFile(
                f"{self.path}: {what} at byte {self.at} needs {length} bytes; the {limit} has {self.end - self.at} more.",
                "The file is truncated or damaged; get it again.",
            )
