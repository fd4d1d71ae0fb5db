"""A GGUF under official names: stacked experts come out one by one, as slices of the map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_quant.errors import CorruptFile, UnsupportedModel
from dsv4_quant.files.gguf_tokenizer import tokenizer_json
from dsv4_quant.files.headers import Header, TensorInfo
from dsv4_quant.files.mapping import map_file, typed_view
from dsv4_quant.formats import FORMATS, Packed
from dsv4_quant.schema import gguf_name

DTYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64,
    "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip


class GgufSource:
    """An open GGUF, in one file or several parts."""

    layout = "gguf"

    def __init__(self, header: Header) -> None:
        self.header = header
        self.path = header.path
        self.config = header.config
        self.raw_config = header.raw_config
        self.metadata = header.metadata
        self._tensors = header.tensors
        self._maps: dict[Path, Tensor] = {}
        self._views: dict[str, Tensor] = {}

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for info in self._tensors.values())

    def has(self, name: str) -> bool:
        try:
            stored, expert = gguf_name(name)
        except (KeyError, ValueError):
            return False
        info = self._tensors.get(stored)
        return info is not None and (expert is None or 0 <= expert < info.shape[0])

    def read(self, name: str) -> Packed:
        if not self.has(name):
            raise CorruptFile(
                f"{self.path} has no tensor for {name}.", "The file is incomplete; convert the model again."
            )
        stored, expert = gguf_name(name)
        info = self._tensors[stored]
        if info.dtype not in FORMATS:
            raise UnsupportedModel(
                f"{info.file}: {stored} is stored as {info.dtype}.", "A newer gguf package may know it."
            )
        view, shape = self._view(info), info.shape
        if expert is not None:
            view, shape = view[expert], shape[1:]
        return Packed(info.dtype, shape, view)

    def tokenizer(self) -> dict[str, Any] | None:
        return tokenizer_json(self.metadata, str(self.path))

    def maps(self) -> dict[Path, Tensor]:
        return {file: self._map(file) for file in self.header.files()}

    def close(self) -> None:
        self._views.clear()
        self._maps.clear()

    def _view(self, info: TensorInfo) -> Tensor:
        """Typed numbers of the tensor's shape, or uint8 whose last dimension is the bytes of a row."""
        if info.name not in self._views:
            flat = typed_view(self._map(info.file), info.offset, info.nbytes, DTYPES.get(info.dtype, torch.uint8))
            self._views[info.name] = flat.view(*info.shape[:-1], -1)
        return self._views[info.name]

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            self._maps[file] = map_file(file)
        return self._maps[file]
