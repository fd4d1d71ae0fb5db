"""The only maker of output tensors and of storage that is filled later.

With poison on, new memory is NaN (the lowest value for signed integers, and 255 for bytes, which is no number as a scale), so
that a kernel which forgets a tail, or a model which reads a slot that nobody wrote, fails in every test instead of once in a
blue moon.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_poisoned = False
_held: list[object] | None = None


def poison(on: bool) -> None:
    """Turns the filling of new memory on or off; the tests turn it on for every test."""
    global _poisoned
    _poisoned = on


def hold(on: bool) -> None:
    """Keeps alive all that is made from now on until it is turned off, for kernels that have yet to run."""
    global _held
    _held = [] if on else None


def held(x: T) -> T:
    """x, kept alive like what is made here."""
    if _held is not None:
        _held.append(x)
    return x


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory whose contents must not be relied upon."""
    return _made(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x: Tensor) -> Tensor:
    """Contiguous memory of x's shape, dtype and device."""
    return _made(torch.empty_like(x, memory_format=torch.contiguous_format))  # a third of the time of `empty`


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory filled with `value`."""
    return held(torch.full(shape, value, dtype=dtype, device=device))


def _made(out: Tensor) -> Tensor:
    if _poisoned:
        whole = 255 if out.dtype == torch.uint8 else None
        out.fill_(float("nan") if out.is_floating_point() or out.is_complex() else whole or torch.iinfo(out.dtype).min)
    return held(out)
