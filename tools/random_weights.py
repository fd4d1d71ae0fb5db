"""Random weights of any format, made in the memory where they are wanted, fast enough for a whole model: some rows are encoded
for real, once for each format and width, and a matrix draws its rows from them. No scale is absurd, and no product overflows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor

from dsv4_quant.formats import FORMATS, Packed, fp4, fp8_e4m3

SEEDS = 16  # rows that are encoded
APART = {"fp4": fp4.encode, "fp8_e4m3": fp8_e4m3.encode}  # formats whose scales do not lie with their rows


def packed(name: str, rows: int, cols: int, random: Generator) -> Packed:
    """A matrix whose products with normally distributed numbers are distributed so too, on the generator's device.

    Raises KeyError for an unknown format, ValueError for one that we do not write and for columns that are no whole blocks.
    """
    data, scale = (None if part is None else part.to(random.device) for part in _seeds(name, cols))
    assert data is not None
    drawn = torch.randint(len(data), (rows,), generator=random, device=random.device)
    if scale is not None and (share := FORMATS[name].scale_rows) > 1:  # the seeds have one row of scales, and so has everyone
        return Packed(name, (rows, cols), _rows(data, drawn), _rows(scale, drawn[:-(-rows // share)] * 0))
    return Packed(name, (rows, cols), _rows(data, drawn), None if scale is None else _rows(scale, drawn))


@cache
def _seeds(name: str, cols: int) -> tuple[Tensor, Tensor | None]:
    found = FORMATS[name]
    if cols % found.block:
        raise ValueError(f"a row of {cols} is no whole number of {name}'s blocks of {found.block}")
    values = torch.randn(SEEDS, cols, generator=Generator().manual_seed(1)) * cols**-0.5
    if name in APART:
        return APART[name](values)
    if found.encode is None:
        raise ValueError(f"{name} has no encoder")
    return found.encode(values, None), None


def _rows(stored: Tensor, drawn: Tensor) -> Tensor:
    """Small floats as raw bytes on the way: torch looks nothing else of them up."""
    small = stored.element_size() == 1
    return (stored.view(torch.uint8) if small else stored)[drawn].view(stored.dtype)
