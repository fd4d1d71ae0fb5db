"""Results of benchmarks, as rows of a CSV that grows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def append(path: str | Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV file, behind a heading of `names` if it is new. What a row lacks stays empty."""
    fresh = not Path(path).exists()
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
