"""Keeping rows in plain torch."""

from __future__ import annotations

from torch import Tensor


def keep(rows: Tensor, to: Tensor) -> None:
    to.copy_(rows)
