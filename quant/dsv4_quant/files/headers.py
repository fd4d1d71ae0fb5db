"""A model's header: configuration and list of tensors, read without torch and trusted in nothing.

Shapes and offsets come from whoever made the file, so each is checked against the file before anybody uses it.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import gguf_header, gguf_keys, safetensors_header
from dsv4_quant.files.info import DAMAGED, TensorInfo

LARGEST_JSON = 100_000_000  # bytes; the index of the largest release has 15 million

__all__ = ["Head", "Header", "TensorInfo", "check_file", "header_of_heads", "read_head", "read_header"]


@dataclass(frozen=True)
class Header:
    """What is known of a model before a weight is read. `tensors` has official names, or a GGUF's own names and shapes
    (outermost first). `stamps`: of files that are not here yet, what tells them from others."""

    path: Path
    layout: str
    config: ModelConfig
    raw_config: dict[str, Any]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    unexpected: list[str]
    stamps: Mapping[Path, str] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def files(self) -> list[Path]:
        """Those that tensors lie in."""
        return sorted({info.file for info in self.tensors.values()})

    def by_role(self) -> Mapping[str, list[TensorInfo]]:
        """The tensors by what they are for (schema.Role); "other" for those that the schema does not know."""
        return self._groups

    @cached_property
    def _groups(self) -> dict[str, list[TensorInfo]]:
        """Asked for several times in a plan, and to spell 69,000 names of an official checkpoint takes a while."""
        expected: Iterable[Any] = schema.gguf_tensors(self.config)
        if self.layout == "official":
            expected = schema.tensors(self.config, schema.Variant.of(self.tensors))
        roles = {spec.name: spec.role for spec in expected}
        groups: dict[str, list[TensorInfo]] = {}
        for name, info in self.tensors.items():
            groups.setdefault(roles.get(name, "other"), []).append(info)
        return groups


def read_header(path: str | Path) -> Header:
    """Reads the header of a checkpoint folder or a GGUF file. Raises CorruptFile and UnsupportedModel."""
    path = Path(path)
    try:
        if path.is_dir():
            present = {entry.name for entry in os.scandir(path) if entry.name.endswith(".safetensors") and entry.is_file()}
            return _official(path, present, safetensors_header.read)
        if not path.is_file():
            raise CorruptFile(f"{path} does not exist.", "Give a checkpoint folder or a .gguf file.")
        return _gguf(path)
    except OSError as error:
        hint = "Its disk failed; get the file again." if error.errno == errno.EIO else "Check its permissions."
        raise CorruptFile(f"{error.filename or path} cannot be read: {error.strerror}.", hint) from None


class Head(NamedTuple):
    """The beginning of a .safetensors file that may be elsewhere: its header, the file's size, and a digest of the whole."""

    data: bytes
    size: int
    digest: str


def read_head(read: Callable[[int, int], bytes], size: int, name: str) -> bytes:
    """The header of a .safetensors file of `size` bytes, of which `read` gives (start, length). Raises CorruptFile."""
    path = Path(name)
    first = read(0, safetensors_header.LENGTH)
    head = first + read(len(first), safetensors_header.length_of(first, size, path))
    safetensors_header.parse(head, size, path)
    return head


def header_of_heads(folder: Path, heads: Mapping[str, Head]) -> Header:
    """What `read_header` will say of a checkpoint folder in which only the .json files are, and of the shards their heads."""

    def read(shard: Path) -> dict[str, TensorInfo]:
        return safetensors_header.parse(heads[shard.name].data, heads[shard.name].size, shard)

    stamps = {folder / name: f"{name} {head.size} {head.digest}" for name, head in heads.items()}
    return replace(_official(folder, set(heads), read), stamps=stamps)


def check_file(path: Path, name: str) -> None:
    """Parses the header of one file of a model, which is called `name` when it is finished: config.json, a .safetensors, a
    .gguf. Others are left alone. Raises CorruptFile and UnsupportedModel."""
    if name == "config.json":
        ModelConfig.from_dict(_json(path), name)
    elif name.endswith(".safetensors"):
        safetensors_header.read(path)
    elif name.endswith(".gguf"):
        gguf_header.read(path)


def _official(folder: Path, present: set[str], read: Callable[[Path], dict[str, TensorInfo]]) -> Header:
    """Of a folder in which the .safetensors files `present` are; `read` reads the header of one."""
    raw = _json(folder / "config.json")
    config = ModelConfig.from_dict(raw, str(folder / "config.json"))
    found: dict[str, TensorInfo] = {}
    for shard in _shards(folder, present):
        for name, info in read(shard).items():
            name = schema.normalise(name)
            if name in found:
                raise CorruptFile(
                    f"{name} is in both {found[name].file.name} and {shard.name}.", "Remove the stray file."
                )
            found[name] = info
    unexpected = schema.check_official(found, config, str(folder))
    return Header(folder, "official", config, raw, {}, found, unexpected)


def _shards(folder: Path, present: set[str]) -> list[Path]:
    """The safetensors files that make the model: those of the index or, without one, all there are."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not present:
            raise CorruptFile(f"{folder} has no .safetensors file.", "Give the folder of a downloaded checkpoint.")
        return _complete(folder, present | _siblings(min(present)), present)
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CorruptFile(f"{index} has no weight_map.", "Get the index again.")
    wanted = set(names.values())
    outside = next((name for name in sorted(wanted) if name in ("", "..") or Path(name).name != name), None)
    if outside is not None:
        raise CorruptFile(f"{index} points to {outside!r}, outside its folder.", DAMAGED)
    return _complete(folder, wanted, present)


def _siblings(name: str) -> set[str]:
    """All shards of the set that a name like model-00002-of-00046.safetensors speaks of."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name)
    if match is None:
        return set()
    return {f"{match[1]}-{number:05d}-of-{match[2]}.safetensors" for number in range(1, int(match[2]) + 1)}


def _complete(folder: Path, wanted: set[str], present: set[str]) -> list[Path]:
    missing = sorted(wanted - present)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptFile(f"{folder} lacks {missing[0]}{more} of {len(wanted)} shards.", "Complete the download.")
    return [folder / name for name in sorted(wanted)]


def _json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CorruptFile(f"{path} is not a file.", "Get the checkpoint again.")
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CorruptFile(f"{path} has {path.stat().st_size} bytes; {LARGEST_JSON} are believed.", DAMAGED)
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFile(f"{path} does not exist.", "Give the folder of a downloaded checkpoint.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not readable JSON: {error}.", "Get the file again.") from None
    if not isinstance(data, dict):
        raise CorruptFile(f"{path} is not a JSON object.", "Get the file again.")
    return data


def _gguf(path: Path) -> Header:
    parts = gguf_header.read_parts(path)
    metadata = parts[0].metadata
    found = _joined(part.tensors for part in parts)
    raw = gguf_keys.config_dict(metadata, {name: info.shape for name, info in found.items()}, str(path))
    config = ModelConfig.from_dict(raw, str(path))
    unexpected = schema.check_gguf(found, config, str(path))
    return Header(path, "gguf", config, raw, metadata, found, unexpected)


def _joined(parts: Iterable[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for tensors in parts:
        for name, info in tensors.items():
            if name in found:
                raise CorruptFile(
                    f"{name} is in both {found[name].file.name} and {info.file.name}.", "Get the parts again."
                )
            found[name] = info
    return found
