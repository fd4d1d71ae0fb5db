"""What a number format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Stored rows and, for formats whose scales lie apart, the scales of these rows -> float32 rows.
Decode = Callable[[Tensor, Tensor | None], Tensor]
# Float rows [n, columns] and how much each column's error matters, [columns] or [n, columns] -> stored rows.
Encode = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store numbers.

    `block` elements of a row take `block_bytes` bytes (scales that lie apart not counted). `decode(rows, scales)` takes
    stored rows `[n, ...]` and, where scales lie apart, a scale row for each of them `[n, blocks]`, and returns float32.
    `scale_rows` rows of the matrix share a row of scales; 0 where there are none apart. `encode(rows, importance)` is
    there for the formats that we write: uint8 `[n, columns / block * block_bytes]`, or typed numbers for plain ones.
    """

    name: str
    block: int
    block_bytes: int
    decode: Decode
    scale_rows: int = 0
    encode: Encode | None = None


def typed(rows: Tensor, scales: Tensor | None) -> Tensor:
    """Decodes what torch stores as numbers already."""
    return rows.float()
