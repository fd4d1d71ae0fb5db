"""What every door asks of its arguments: one sentence with the numbers when a shape does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4_quant.formats import Packed


def demand_shape(name: str, x: Tensor | Packed, *expected: int | None) -> None:
    """Raises ValueError unless x has these sizes; None stands for any size, and takes longer than the size that it has."""
    shape = x.shape
    if shape == expected:  # the usual case, and several hundred times a token
        return
    if len(shape) == len(expected) and all(want is None or have == want for have, want in zip(shape, expected, strict=True)):
        return
    raise ValueError(f"{name} has shape {list(shape)}, but {_spelled(expected)} was expected")


def demand_multiple(name: str, size: int, of: int) -> None:
    """Raises ValueError unless `size` is a positive multiple of `of`."""
    if size <= 0 or size % of:
        raise ValueError(f"{name} is {size}, but must be a positive multiple of {of}")


def _spelled(expected: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in expected) + "]"
