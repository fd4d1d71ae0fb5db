"""Kernels that are written down now and computed soon, while Python goes on (queue.h).

Python's share of a token hides behind the kernels, as it does on a GPU. And as there, whatever a kernel reads or writes must
stay where it is until the queue has been waited for: what `alloc` makes does, so do weights and states; anything else is the
queueing caller's to hold. Only kernels may touch what kernels compute; torch has to wait for it, as in `by_torch`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_int, c_void_p
from typing import Any, TypeVar
from weakref import finalize

from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.native.library import load, signature, trouble

signature("dsv4_begin", c_int, result=c_int)
signature("dsv4_wait")
signature("dsv4_end")
signature("dsv4_tape_new", result=c_void_p)
signature("dsv4_tape_free", c_void_p)
signature("dsv4_tape_record", c_void_p)
signature("dsv4_tape_replay", c_void_p)

T = TypeVar("T")


class _Queue(threading.local):
    """Of each thread its own; the kernels serve one at a time."""

    open = False
    taping = False

    def __init__(self) -> None:
        self.checks: list[Callable[[], None]] = []


_here = _Queue()


@contextmanager
def queued(*, lazily: bool = False) -> Iterator[None]:
    """Queues the CPU kernels that are called within; all are computed when it ends.

    Changes nothing within another, without a second thread or without kernels. lazily: nothing is computed before it has
    to be, so that a test can see whether something was let go too early. Raises what `later` was told to.
    """
    if _here.open or _here.taping or trouble() is not None or not load().dsv4_begin(lazily):
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
    """Returns when everything queued so far has been computed. Raises RuntimeError on a tape, where nothing will have been."""
    if _here.taping:
        raise RuntimeError("a part of it is computed by torch, or needs what kernels have yet to compute")
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
    if _here.open or _here.taping:
        _here.checks.append(check)
    else:
        check()


class Tape:
    """Kernels written down once, to be computed again and again on what their memory then holds. What `alloc` makes meanwhile
    lies in an arena; weights, states and inputs are the caller's to keep."""

    def __init__(self, arena: alloc.Arena) -> None:
        """arena: of all tapes that are never computed at once. Raises BuildError where there are no kernels."""
        self._tape, self._arena = load().dsv4_tape_new(), arena
        finalize(self, load().dsv4_tape_free, self._tape)
        self._within = ExitStack()
        self._kept: list[object] = []
        self._checks: list[Callable[[], None]] = []

    def begin(self) -> None:
        """What this thread calls from now on is written down and not computed. Raises RuntimeError within a queue or a tape."""
        if _here.open or _here.taping:
            raise RuntimeError("kernels are being written down already")
        self._kept = self._within.enter_context(alloc.within(self._arena))
        self._within.callback(self._stop)
        load().dsv4_tape_record(self._tape)
        _here.taping = True

    def end(self) -> None:
        self._checks = _here.checks
        self.abandon()

    def abandon(self) -> None:
        """Ends it in whatever condition it is."""
        self._within.close()

    def replay(self) -> None:
        """Computes it. Raises what `later` was told to."""
        with queued():
            load().dsv4_tape_replay(self._tape)
        for check in self._checks:
            check()

    @staticmethod
    def _stop() -> None:
        load().dsv4_tape_record(None)
        _here.taping, _here.checks = False, []
