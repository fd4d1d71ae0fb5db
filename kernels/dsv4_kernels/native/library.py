"""The compiled kernels as Python functions: loading, threads, and how a weight is handed over."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path

from dsv4_kernels.native import processors
from dsv4_kernels.native.build import VARIANTS, BuildError, built_path, find_compiler, library_path
from dsv4_quant.formats import grids

P, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float  # of the signatures: pointers, sizes, numbers
LARGE_PAGE = 1 << 21

_library: ctypes.CDLL | None = None  # what the doors compute with
_opened: list[ctypes.CDLL] = []
_threads: int | None = None
_asks = False
_signatures: dict[str, tuple[tuple[type, ...], type | None]] = {"dsv4_set_grids": ((P, P), None),
                                                               "dsv4_read": ((P, I, P), None),
                                                               "dsv4_ask_ahead": ((I,), None)}


def folder() -> Path:
    """Where compiled libraries lie: DSV4_NATIVE_FOLDER, or `native` in DSV4_CACHE, DSV4_HOME/cache, the user's cache."""
    if chosen := os.environ.get("DSV4_NATIVE_FOLDER"):
        return Path(chosen)
    if chosen := os.environ.get("DSV4_CACHE"):
        return Path(chosen) / "native"
    if home := os.environ.get("DSV4_HOME"):
        return Path(home) / "cache" / "native"
    return user_cache_path("dsv4") / "native"


def load() -> ctypes.CDLL:
    """The library for this machine, built if need be. Raises BuildError."""
    global _library
    if _library is None:
        _library = _find()
    return _library


def _find() -> ctypes.CDLL:
    return open_library(library_path(folder(), _variant()))


def _variant() -> str:
    variant = os.environ.get("DSV4_NATIVE", "native")
    if variant not in VARIANTS:
        raise BuildError(f"DSV4_NATIVE is {variant!r}, so there are no CPU kernels.",
                         f"Unset it, or choose one of {', '.join(VARIANTS)}.")
    return variant


def is_built() -> bool:
    """Whether `load` will find its library, so that nobody has to wait for a compiler. Raises BuildError as it does."""
    return built_path(folder(), _variant()).exists()


def about() -> dict[str, str | int]:
    """The library in words: where it is, compiled by what, for which instructions, with how many threads."""
    library = load()
    library.dsv4_instructions.restype = ctypes.c_char_p
    return {"library": str(built_path(folder(), _variant())), "compiler": find_compiler(),
            "instructions": library.dsv4_instructions().decode(), "threads": threads()}


def open_library(path: Path) -> ctypes.CDLL:
    """A compiled library, with its functions declared, its look-up tables filled and its threads started."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"The CPU kernels were built but cannot be loaded: {error}.",
                         f"Remove {path} and try again.") from error
    _opened.append(library)
    for name in _signatures:
        _declare(library, name)
    tables = (grids.iq2_xxs(), grids.iq3_xxs())
    library.dsv4_set_grids(*(table.data_ptr() for table in tables))
    _set_threads(library, _threads or processors.physical_cores())
    return library


def signature(name: str, *types: type, result: type | None = None) -> None:
    """Declares what a function of the library takes and returns, mostly nothing. Called where the function is used."""
    _signatures[name] = types, result
    for library in _opened:
        _declare(library, name)


def _declare(library: ctypes.CDLL, name: str) -> None:
    function = getattr(library, name)
    function.argtypes, function.restype = _signatures[name]


@cache
def trouble() -> BuildError | None:
    """Why there are no native kernels, or None when there are."""
    try:
        load()
    except BuildError as error:
        return error
    return None


def set_threads(count: int | None) -> int:
    """Uses `count` threads from now on, or one per physical core; returns how many."""
    global _threads
    _threads = count
    wanted = count or processors.physical_cores()
    if trouble() is None:
        _set_threads(load(), wanted)
    return wanted


def threads() -> int:
    """How many threads the native kernels use."""
    return int(load().dsv4_threads()) if trouble() is None else 0


def _set_threads(library: ctypes.CDLL, count: int) -> None:
    cpus = processors.places(count)
    library.dsv4_set_threads(count, (ctypes.c_int * len(cpus))(*cpus), len(cpus))


def ask_ahead(at_once: int) -> None:
    """Has experts asked for, `at_once` bytes with each request, before they are multiplied: some do not lie in memory."""
    global _asks
    if trouble() is None:
        load().dsv4_ask_ahead(at_once)
        _asks = at_once > 0


def asks_ahead() -> bool:
    """Whether `ask_ahead` was told to ask."""
    return _asks


class Reader:
    """Reads a buffer of its own with all threads together, as fast as they can: in large pages where the system has them, since
    every page's address has to be found too."""

    def __init__(self, nbytes: int) -> None:
        """nbytes: of the buffer, which should be larger than the outer cache by far."""
        rounded = -(-nbytes // LARGE_PAGE) * LARGE_PAGE
        self._memory = mmap.mmap(-1, rounded)  # which begins at a large page where there are such
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8).fill_(1)
        self._at, self._total = 0, ctypes.c_int64()

    def rate(self, nbytes: int | None = None) -> float:
        """Bytes per second of reading the next `nbytes` of the buffer, which is gone through round and round, or all of it.
        Raises BuildError."""
        size = len(self._bytes) if nbytes is None else nbytes // 64 * 64
        if self._at + size > len(self._bytes):
            self._at = 0
        part = self._bytes[self._at:self._at + size]
        self._at += size
        began = time.perf_counter()
        load().dsv4_read(part.data_ptr(), len(part), ctypes.byref(self._total))
        return len(part) / (time.perf_counter() - began)


def read_bandwidth(nbytes: int = 1 << 30, tries: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the median of some tries over a buffer of `nbytes`."""
    reader = Reader(nbytes)
    return statistics.median(reader.rate() for _ in range(tries))
