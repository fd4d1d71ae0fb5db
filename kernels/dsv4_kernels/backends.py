"""Which implementation of an operation runs, and why.

An operation is a folder of this package and a backend is a file in it: `ref` (plain torch, everywhere), `cpu`, `gpu`.
Nothing falls back unseen: a backend that is asked for and cannot run is an error, and every choice carries its reason,
which `dsv4 doctor` prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from dsv4_kernels import alloc
from dsv4_kernels.native import library, processors, queue
from dsv4_kernels.unpack import LAYOUTS
from dsv4_quant.errors import QuantError

OPERATIONS = ("linear", "norm_rope", "rounding", "cache", "hyper", "compressor", "indexer", "prologue", "attention",
              "router", "moe", "residual", "held", "sampling")
NATIVE = {"cpu": "cpu", "cuda": "gpu"}  # device type -> the file that is written for it
BACKENDS = ("ref", *NATIVE.values())
Watcher = Callable[[str, tuple[Any, ...]], None]  # (name of the door, what was given to the backend)


class Choice(NamedTuple):
    """A picked backend: the module that implements the operation, its name, and why it was picked."""

    module: ModuleType
    name: str
    reason: str


class BackendError(QuantError):
    """A backend was asked for that does not exist or cannot run here."""


@cache
def pick(op: str, device: str = "cpu", forced: str | None = None) -> Choice:
    """The backend of operation `op` for tensors on a device of type `device` ("cpu", "cuda").

    forced: the only backend that may run. Raises BackendError when it is unknown, missing for this operation, or
    written for another type of device; ValueError when there is no such operation.
    """
    if op not in OPERATIONS:
        raise ValueError(f"there is no operation {op!r}; there are {', '.join(OPERATIONS)}")
    if forced is not None:
        return _forced(op, device, forced)
    native = NATIVE.get(device)
    if native and _exists(op, native):
        if trouble := _trouble(native):
            return Choice(_module(op, "ref"), "ref", trouble.message)
        return Choice(_module(op, native), native, f"{native} is written for {device}")
    return Choice(_module(op, "ref"), "ref", f"{op} has no implementation of its own for {device}")


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """While this lasts, `watcher` is told of every call through a door before it is computed.

    The watcher stands between door and backend, so nothing becomes slower where nobody watches.
    """
    _watchers.append(watcher)
    pick.cache_clear()
    try:
        yield
    finally:
        _watchers.remove(watcher)
        pick.cache_clear()


@contextmanager
def interpreted() -> Iterator[None]:
    """While this lasts, tensors on the CPU go to the Triton kernels, which Triton's interpreter computes: slow, but it is how a
    GPU's path is tested where no card is. For that TRITON_INTERPRET=1 must be set before Triton is first imported."""
    known = dict(NATIVE)
    NATIVE["cpu"] = "gpu"
    pick.cache_clear()
    try:
        yield
    finally:
        NATIVE.clear()
        NATIVE.update(known)
        pick.cache_clear()


_watchers: list[Watcher] = []


class _Watched(ModuleType):
    """Stands where a backend's module stands."""

    def __init__(self, module: ModuleType, watcher: Watcher) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _watcher=watcher)

    def __getattr__(self, name: str) -> Any:
        function, watcher = getattr(self.__dict__["_module"], name), self.__dict__["_watcher"]

        def told(*given: Any) -> Any:
            watcher(name, given)
            return function(*given)

        return told


def _forced(op: str, device: str, name: str) -> Choice:
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r}.", f"Choose one of {', '.join(BACKENDS)}.")
    if not _exists(op, name):
        raise BackendError(f"{op} has no backend {name!r}.", "Choose ref, or leave the choice open.")
    if name != "ref" and NATIVE.get(device) != name:
        raise BackendError(f"Backend {name!r} of {op} cannot compute on {device}.", "Choose ref, or move the model.")
    if trouble := _trouble(name):
        raise trouble
    return Choice(_module(op, name), name, "it was asked for")


def cpu_trouble() -> QuantError | None:
    """Why the CPU's own kernels cannot run here (no compiler, say), or None when they can; builds them if need be."""
    return library.trouble()


def cpu_is_built() -> bool:
    """False when the next use of the CPU's own kernels begins with compiling them, which takes a while."""
    try:
        return library.is_built()
    except QuantError:
        return True  # nothing will be compiled


def cpu_about() -> dict[str, str | int]:
    """Facts about the CPU's own kernels, for people. Raises what `cpu_trouble` returns."""
    return library.about()


def read_bandwidth() -> float:
    """Bytes per second that the CPU kernels' threads read from memory. Raises what `cpu_trouble` returns."""
    return library.read_bandwidth()


def reader(nbytes: int) -> library.Reader:
    """Reads memory piece by piece, between other things. Raises what `cpu_trouble` returns."""
    return library.Reader(nbytes)


def use_threads(count: int | None) -> int:
    """Lets the CPU kernels use `count` threads, or one per physical core for None; returns how many."""
    return library.set_threads(count)


def most_threads() -> int:
    """How many threads the CPU kernels use unless told otherwise: one per physical core."""
    return processors.physical_cores()


def ask_ahead(at_once: int) -> None:
    """From now on the CPU kernels ask the system for experts, `at_once` bytes with each request, before they multiply them;
    0: no longer. Worth it where not all of them fit into memory. Without kernels nothing changes."""
    library.ask_ahead(at_once)


def asks_ahead() -> bool:
    """Whether experts are asked for before they are multiplied."""
    return library.asks_ahead()


def queued(*, lazily: bool = False) -> AbstractContextManager[None]:
    """Queues the CPU kernels called within, which then compute while Python goes on; see native.queue for what that asks of
    the caller. All are computed when it ends. Nothing is queued while somebody watches, who wants to see numbers, nor where
    the CPU's own kernels do not compute."""
    return nullcontext() if _watchers or NATIVE.get("cpu") != "cpu" else queue.queued(lazily=lazily)


def repeatable(device: str) -> bool:
    """Whether what is computed on devices of this type may be recorded and repeated for another token: what the Triton kernels or
    the CPU's own compute, unless somebody watches, who would see only the first."""
    return not _watchers and (NATIVE.get(device) == "gpu" or on_tape(device))


def on_tape(device: str) -> bool:
    """Whether the CPU's own kernels compute on devices of this type, which a Tape records."""
    return NATIVE.get(device) == "cpu" and cpu_trouble() is None


def tapes() -> Callable[[], queue.Tape]:
    """Makes tapes for calls of the CPU kernels that are to be repeated, never two at once. Raises what `cpu_trouble` returns."""
    arena = alloc.Arena()
    return lambda: queue.Tape(arena)


def gpu_trouble() -> QuantError | None:
    """Why the Triton kernels cannot run here, or None when they can wherever torch finds a card."""
    if find_spec("triton") is None:
        return BackendError("Triton is not installed, so no GPU kernel can be compiled.",
                            "pip install triton (Linux), or use --device cpu.")
    return None


def gpu_formats() -> frozenset[str]:
    """Formats of matrices that the Triton kernels read."""
    return frozenset(LAYOUTS)


def _trouble(name: str) -> QuantError | None:
    return {"cpu": cpu_trouble, "gpu": gpu_trouble}[name]() if name != "ref" else None


def _exists(op: str, name: str) -> bool:
    return find_spec(f"{__package__}.{op}.{name}") is not None


def _module(op: str, name: str) -> ModuleType:
    module = import_module(f"{__package__}.{op}.{name}")
    for watcher in _watchers:
        module = _Watched(module, watcher)
    return module
