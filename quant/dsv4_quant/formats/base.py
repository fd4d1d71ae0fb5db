"""What a number format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Stored rows and, for formats whose scales lie apart, the scales of these rows -> float32 rows.
Decode = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store numbers.

    `block` elements of a row take `block_bytes` bytes (scales that lie apart not counted). `decode(rows, scales)` takes
    stored rows `[n, ...]` and, where scales lie apart, a scale row for each of them `[n, blocks]`, and returns float32.
    `scale_rows` rows of the matrix share a row of scales; 0 where there are none apart.
    """

    name: str
    block: int
    block_bytes: int
    decode: Decode
    scale_rows: int = 0


def typed(rows: Tensor, scales: Tensor | None) -> Tensor:
    """Decodes what torch stores as numbers already."""
    return rows.float()
