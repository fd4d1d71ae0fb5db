"""Makes GGUFs whose headers say whatever a test wants: no library in between to object."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STRING, ARRAY = 8, 9
CODES = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 12: "d"}


@dataclass
class Gguf:
    """A GGUF in the making. Keys are (name, kind, value); tensors are (name, dimensions, kind, offset)."""

    keys: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)
    data: bytes = bytes(4096)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    key_count: int | None = None

    def write(self, path: Path) -> Path:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.key_count is None else self.key_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        for name, kind, value in self.keys:
            head += text(name) + struct.pack("<I", kind) + self._value(kind, value)
        for name, dimensions, kind, offset in self.tensors:
            head += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
        path.write_bytes(head + bytes(-len(head) % 32) + self.data)
        return path

    @staticmethod
    def _value(kind: int, value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body
