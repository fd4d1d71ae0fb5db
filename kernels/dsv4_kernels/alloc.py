"""The only maker of output tensors and of storage that is filled later.

With poison on, new memory is NaN (the lowest value for integers), so that a kernel which forgets a tail, or a model
which reads a slot that nobody wrote, fails in every test instead of once in a blue moon.
"""

from __future__ import annotations

import torch
from torch import Tensor

_poisoned = False


def poison(on: bool) -> None:
    """Turns the filling of new memory on or off; the tests turn it on for every test."""
    global _poisoned
    _poisoned = on


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory whose contents must not be relied upon."""
    return _poison(torch.empty(shape, dtype=dtype, device=device))


def empty_like(x: Tensor) -> Tensor:
    """Contiguous memory of x's shape, dtype and device."""
    return _poison(torch.empty_like(x, memory_format=torch.contiguous_format))  # a third of the time of `empty`


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory filled with `value`."""
    return torch.full(shape, value, dtype=dtype, device=device)


def _poison(out: Tensor) -> Tensor:
    if _poisoned:
        out.fill_(float("nan") if out.is_floating_point() or out.is_complex() else torch.iinfo(out.dtype).min)
    return out
