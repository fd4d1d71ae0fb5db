"""The only maker of output tensors and of storage that is filled later.

With poison on, new memory is NaN (the lowest value for signed integers, and 255 for bytes, which is no number as a scale), so
that a kernel which forgets a tail, or a model which reads a slot that nobody wrote, fails in every test instead of once in a
blue moon.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char
from typing import Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor

T = TypeVar("T")

_poisoned = False


class _Here(threading.local):
    """Of each thread its own."""

    held: list[object] | None = None
    arena: Arena | None = None


_here = _Here()


def poison(on: bool) -> None:
    """Turns the filling of new memory on or off; the tests turn it on for every test."""
    global _poisoned
    _poisoned = on


def hold(on: bool) -> None:
    """Keeps alive all that is made from now on until it is turned off, for kernels that have yet to run."""
    _here.held = [] if on else None


class Arena:
    """The CPU's memory for what kernels hand to each other that are written down once and always computed in the same order: what
    nobody can reach any more when a kernel is written down is free for its results, then and each time it is computed. Of several
    such sequences with one arena, the results of one are good until another is computed."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = {}  # by size in bytes

    @property
    def nbytes(self) -> int:
        """Bytes that are free now."""
        return sum(size * len(free) for size, free in self._free.items())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        size = -(-count * dtype.itemsize // 64) * 64
        free = self._free.setdefault(size, [])
        memory: Any = free.pop() if free else torch.empty(size, dtype=torch.uint8).numpy()
        window = (c_char * size).from_buffer(memory)  # which lives as long as any view of the tensor
        finalize(window, free.append, memory).atexit = False
        return torch.frombuffer(window, dtype=dtype, count=count).view(shape)


@contextmanager
def within(arena: Arena) -> Iterator[list[object]]:
    """What is made meanwhile on the CPU lies in this arena. Yields what must live as long as kernels may be computed."""
    kept: list[object] = []
    _here.held, _here.arena = kept, arena
    try:
        yield kept
    finally:
        _here.held = _here.arena = None


def held(x: T) -> T:
    """x, kept alive like what is made here."""
    if _here.held is not None:
        _here.held.append(x)
    return x


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory whose contents must not be relied upon."""
    if _here.arena is not None and device == "cpu":
        return _poisoned_if_wanted(_here.arena.empty(shape, dtype))
    return held(_poisoned_if_wanted(torch.empty(shape, dtype=dtype, device=device)))


def empty_like(x: Tensor) -> Tensor:
    """Contiguous memory of x's shape, dtype and device."""
    if _here.arena is not None and x.device.type == "cpu":
        return empty(tuple(x.shape), x.dtype)
    made = torch.empty_like(x, memory_format=torch.contiguous_format)  # a third of the time of `empty`
    return held(_poisoned_if_wanted(made))


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory filled with `value`."""
    return held(torch.full(shape, value, dtype=dtype, device=device))


def _poisoned_if_wanted(out: Tensor) -> Tensor:
    if _poisoned:
        whole = 255 if out.dtype == torch.uint8 else None
        out.fill_(float("nan") if out.is_floating_point() or out.is_complex() else whole or torch.iinfo(out.dtype).min)
    return out
