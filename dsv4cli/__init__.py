"""dsv4: run DeepSeek-V4 on your own machine. `from dsv4cli import Engine` is the door for Python programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4cli.engine import Engine

__all__ = ["Engine", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Engine":  # on use: it brings torch, and `dsv4 --help` must not
        from dsv4cli.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
