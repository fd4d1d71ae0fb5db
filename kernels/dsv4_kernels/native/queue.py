"""Kernels that are written down now and computed soon, while Python goes on (queue.h).

Python's share of a token hides behind the kernels, as it does on a GPU. And as there, whatever a kernel reads or writes must
stay where it is until the queue has been waited for: what `alloc` makes does, so do weights and states; anything else is the
queueing caller's to hold. Only kernels may touch what kernels compute; torch has to wait for it, as in `by_torch`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int
from typing import Any, TypeVar

from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.native.library import load, signature, trouble

signature("dsv4_begin", c_int, result=c_int)
signature("dsv4_wait")
signature("dsv4_end")

T = TypeVar("T")


class _Queue(threading.local):
    """Of each thread its own; the kernels serve one at a time."""

    open = False

    def __init__(self) -> None:
        self.checks: list[Callable[[], None]] = []


_here = _Queue()


@contextmanager
def queued(*, lazily: bool = False) -> Iterator[None]:
    """Queues the CPU kernels that are called within; all are computed when it ends.

    Changes nothing within another, without a second thread or without kernels. lazily: nothing is computed before it has
    to be, so that a test can see whether something was let go too early. Raises what `later` was told to.
    """
    if _here.open or trouble() is not None or not load().dsv4_begin(lazily):
        yield
        return
    _here.open = True
    alloc.hold(True)
    try:
        yield
    finally:
        checks, _here.checks = _here.checks, []
        load().dsv4_end()
        _here.open = False
        alloc.hold(False)
    for check in checks:
        check()


def settle() -> None:
    """Returns when everything queued so far has been computed."""
    if _here.open:
        load().dsv4_wait()


def by_torch(compute: Callable[..., T], *arguments: Any) -> T:
    """What `compute` makes, a tensor or several, of arguments that kernels may have yet to compute."""
    settle()
    made = compute(*arguments)
    for tensor in made if isinstance(made, tuple) else (made,):
        alloc.held(tensor)
    return made


def dense(x: Tensor) -> Tensor:
    """x if it is contiguous, else a copy that is."""
    return x if x.is_contiguous() else by_torch(x.contiguous)


def later(check: Callable[[], None]) -> None:
    """Calls `check`, which raises if a kernel complained, as soon as the kernel has been computed."""
    if _here.open:
        _here.checks.append(check)
    else:
        check()
