"""The files that weights lie in: official safetensors and GGUF, mapped and never copied, behind one `Source`.

`headers` does without torch; the readers are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_quant.files.open import open_source
    from dsv4_quant.files.source import Source

__all__ = ["Source", "open_source"]


def __getattr__(name: str) -> Any:
    if name == "open_source":
        from dsv4_quant.files.open import open_source

        return open_source
    if name == "Source":
        from dsv4_quant.files.source import Source

        return Source
    raise AttributeError(name)
