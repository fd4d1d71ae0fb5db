"""Reading a mapped file that is no longer all there: zeros and a note instead of a signal that ends the process (faults.cpp)."""

from __future__ import annotations

from weakref import finalize

from torch import Tensor

from dsv4_kernels.native.library import I, P, load, signature, trouble

signature("dsv4_watch", P, I, result=I)
signature("dsv4_unwatch", I)
signature("dsv4_lost", I, result=I)


class Watch:
    """A whole mapped file, uint8 [size], which has to stay mapped for as long as this is held.

    Without kernels, and on systems without such signals, nobody watches and nothing is ever lost.
    """

    def __init__(self, mapped: Tensor) -> None:
        self._number = -1
        if trouble() is None:
            self._number = load().dsv4_watch(mapped.data_ptr(), mapped.nbytes)
        if self._number >= 0:
            finalize(self, load().dsv4_unwatch, self._number)

    def lost(self) -> int | None:
        """The first byte that could not be read; from there to its end the mapping holds zeros from then on."""
        found = load().dsv4_lost(self._number) if self._number >= 0 else -1
        return found if found >= 0 else None
