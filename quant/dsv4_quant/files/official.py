"""The official layout: safetensors shards, FP4 experts, FP8 matrices with their scales beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.headers import Header, TensorInfo
from dsv4_quant.files.mapping import map_file, typed_view
from dsv4_quant.formats import Packed

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64", "I16": "i16", "I32": "i32", "I64": "i64"}
QUANTISED = ("I8", "F8_E4M3")  # with scales beside them


class OfficialSource:
    """An open checkpoint folder."""

    layout = "official"

    def __init__(self, header: Header) -> None:
        self.header = header
        self.path = header.path
        self.config = header.config
        self.raw_config = header.raw_config
        self.metadata: dict[str, Any] = {}
        self._tensors = dict(header.tensors)
        self._maps: dict[Path, Tensor] = {}

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for info in self._tensors.values())

    def has(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> Packed:
        info = self._info(name)
        if info.dtype in PLAIN:
            return Packed(PLAIN[info.dtype], info.shape, self._view(info))
        if info.dtype not in QUANTISED or not name.endswith(".weight"):
            raise CorruptFile(f"{info.file}: {name} is stored as {info.dtype}.", "DeepSeek-V4 has no such weight.")
        data = self._view(info)
        scale = self._view(self._info(_scale(name)))
        if info.dtype == "I8":  # two FP4 codes a byte
            return Packed("fp4", (info.shape[0], 2 * info.shape[1]), data, scale)
        return Packed("fp8_e4m3", info.shape, data, scale)

    def stored(self, name: str) -> dict[str, TensorInfo]:
        """The tensors that a weight is stored in, and where they lie: itself, and its scale if it has one."""
        info = self._info(name)
        return {name: info} | ({_scale(name): self._info(_scale(name))} if info.dtype in QUANTISED else {})

    def moved(self, tensors: Mapping[str, TensorInfo]) -> None:
        """These tensors lie elsewhere from now on."""
        self._tensors.update(tensors)

    def let_go(self, file: Path) -> None:
        """Closes a file, whose tensors are not read again there."""
        self._maps.pop(file, None)

    def tokenizer(self) -> Path | None:
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    def maps(self) -> dict[Path, Tensor]:
        return {file: self._map(file) for file in self.header.files()}

    def close(self) -> None:
        self._maps.clear()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise CorruptFile(
                f"{self.path} has no tensor {name}.", "The checkpoint is incomplete; get it again."
            ) from None

    def _view(self, info: TensorInfo) -> Tensor:
        return typed_view(self._map(info.file), info.offset, info.nbytes, DTYPES[info.dtype]).view(info.shape)

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            self._maps[file] = map_file(file)
        return self._maps[file]


def _scale(weight: str) -> str:
    return weight.removesuffix("weight") + "scale"
