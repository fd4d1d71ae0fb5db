"""The one way to a model's weights, whatever they are stored in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.files.headers import Header
from dsv4_quant.formats import Packed


class Source(Protocol):
    """An open checkpoint. Weights answer to their official names; a `.scale` comes with its `.weight`."""

    header: Header
    path: Path
    layout: str  # "official" or "gguf"
    config: ModelConfig
    raw_config: dict[str, Any]
    metadata: dict[str, Any]  # a GGUF's key-value pairs; empty for the official layout

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> Packed:
        """The weight, as views of the mapped file. Raises CorruptFile when there is none of that name."""
        ...

    def maps(self) -> dict[Path, Tensor]:
        """Every file that tensors lie in, mapped whole, uint8 [size]: what `read` gives views of."""
        ...

    def tokenizer(self) -> dict[str, Any] | Path | None:
        """tokenizer.json as a path or, from a GGUF, as the dictionary it would hold; None where there is none."""
        ...

    def close(self) -> None:
        """Lets go of the files. Weights read before stay valid as long as they are held."""
        ...
