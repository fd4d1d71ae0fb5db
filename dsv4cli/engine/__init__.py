"""The engine: a loaded model (`Engine`), timelines over it (`Session`), and the stream of `Token` records.

The names below are looked up on first use, so that a command can read the defaults of `Sampling` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4cli.engine.engine import Engine
    from dsv4cli.engine.memory import MemoryPlan
    from dsv4cli.engine.records import Token
    from dsv4cli.engine.sampling import Sampling
    from dsv4cli.engine.session import Session

__all__ = ["Engine", "MemoryPlan", "Sampling", "Session", "Token"]

_HOME = {"Engine": "engine", "MemoryPlan": "memory", "Sampling": "sampling", "Session": "session", "Token": "records"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
