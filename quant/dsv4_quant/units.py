"""Numbers as people read them."""

from __future__ import annotations


def in_bytes(count: int) -> str:
    """123456789 -> '123.5 MB'. Decimal units, as in the sizes of published files."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
