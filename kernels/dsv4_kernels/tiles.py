"""Cutting a computation into tiles of rows, so that a long prompt never makes a [tokens, entries] tensor at once."""

from __future__ import annotations

from collections.abc import Iterator

TILE_VALUES = 1 << 24  # 64 MB of float32


def tiles(rows: int, values_per_row: int, most: int = 1 << 30) -> Iterator[slice]:
    """Slices that cover range(rows), each of at most `most` rows and TILE_VALUES values, but of one row at least."""
    step = min(most, max(1, TILE_VALUES // max(1, values_per_row)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
