"""A conversion whose checkpoint comes shard by shard, and does not stay.

A shard that is here is encoded as far as it goes, then deleted; tensors that wait for another shard are kept in a small file of
their own. Everything is on the disk before a shard goes, so whoever kills the program at any moment loses no more than a shard.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from dsv4_quant import schema
from dsv4_quant.convert import Conversion
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import safetensors_header
from dsv4_quant.files.folders import sync_folder
from dsv4_quant.files.info import TensorInfo
from dsv4_quant.files.official import OfficialSource
from dsv4_quant.spread import Spread, units

AT_ONCE = 2  # shards on the disk
COPIED = 1 << 24  # bytes


class Arriving:
    """What an open conversion needs of the shards to come. Threads may hand shards over at the same time."""

    def __init__(self, conversion: Conversion, source: OfficialSource, sizes: Mapping[str, int], folder: Path,
                 keep: bool = False) -> None:
        """`sizes`: of the shards, which the plan's header says where they will lie; `folder` is for tensors that wait. With
        `keep` shards are not deleted."""
        self._conversion, self._source, self._sizes, self._keep = conversion, source, sizes, keep
        self._shards: dict[str, dict[str, TensorInfo]] = {shard: {} for shard in sizes}
        for name, info in conversion.plan.source.tensors.items():
            self._shards[info.file.name][name] = info
        self._waits = Counter(name for unit in units(conversion.todo(), source) for name in unit.tensors)
        self._spread = Spread(conversion.todo(), source)
        self._here: set[str] = set()  # tensors
        self._kept: dict[Path, dict[str, TensorInfo]] = {}
        self._folder = folder / conversion.work[:16]  # of another work nothing is believed
        self._under_way: set[str] = set()
        self._taking, self._changing = threading.Lock(), threading.Lock()
        for other in folder.glob("*"):
            if other != self._folder:
                shutil.rmtree(other)
        for path in sorted(self._folder.glob("*.safetensors")):
            self._found(path)
        self._gone = {shard for shard in sizes if not self.needs(shard)}
        for shard in () if keep else self._gone:  # the last run was killed before it could
            self._path(shard).unlink(missing_ok=True)

    def needs(self, shard: str) -> bool:
        """Whether a piece is to be made of tensors in this shard that were not kept."""
        return any(self._waits[name] and name not in self._here for name in self._shards[shard])

    def admits(self, shard: str) -> bool:
        """Whether the next shard may begin to arrive: not if with those under way it could take more room than the output
        and two shards. One at a time always may."""
        with self._changing:
            arriving = self._under_way | {shard}
            room = AT_ONCE * max(self._sizes.values()) + self._spread.unwritten(self._gone | arriving)
            kept = self.kept_bytes + sum(map(self._spread.kept, arriving))
            if self._under_way and sum(self._sizes[one] for one in arriving) + kept > room:
                return False
            self._under_way.add(shard)
            return True

    @property
    def kept_bytes(self) -> int:
        return sum(info.nbytes for tensors in list(self._kept.values()) for info in tensors.values())

    def take(self, shard: str) -> None:
        """Encodes all that can be encoded now that `shard` is here, and deletes it. Raises as `Conversion.encode`, and
        CorruptFile for a shard with another header than was planned with."""
        with self._taking:
            tensors = self._shards[shard]
            self._check(shard)
            if tensors.keys() & self._waits.keys():
                self._source.moved(tensors)
                self._here |= tensors.keys()
                self._encode()
            if not self._keep:
                self._leave(shard)
            for path in [path for path, kept in self._kept.items() if not any(self._waits[name] for name in kept)]:
                self._close(path)
                del self._kept[path]
            with self._changing:
                self._under_way.discard(shard)
                self._gone.add(shard)

    def _encode(self) -> None:
        ready = [unit for unit in units(self._conversion.todo(), self._source) if unit.tensors.keys() <= self._here]
        self._conversion.encode(piece for unit in ready for piece in unit.pieces)
        self._waits.subtract(name for unit in ready for name in unit.tensors)

    def _check(self, shard: str) -> None:
        path = self._path(shard)
        found = {schema.normalise(name): info for name, info in safetensors_header.read(path).items()}
        if found != self._shards[shard]:
            raise CorruptFile(f"{path.name} has another header than was planned with.", "Remove what is there, and begin anew.")

    def _leave(self, shard: str) -> None:
        """Keeps what waits for other shards, and deletes the shard."""
        tensors = self._shards[shard]
        if waiting := {name: info for name, info in tensors.items() if self._waits[name]}:
            self._found(_copied(waiting, self._path(shard), self._folder / shard))
        self._here -= tensors.keys() - waiting.keys()
        self._close(self._path(shard))

    def _path(self, shard: str) -> Path:
        return self._conversion.plan.source.path / shard

    def _close(self, path: Path) -> None:
        self._source.let_go(path)
        path.unlink()

    def _found(self, path: Path) -> None:
        """Tensors that were kept."""
        tensors = safetensors_header.read(path)
        self._source.moved(tensors)
        self._here |= tensors.keys()
        self._kept[path] = tensors


def _copied(tensors: Mapping[str, TensorInfo], shard: Path, to: Path) -> Path:
    """Writes tensors of a shard into another file, which is there whole or not at all."""
    entries, at = {}, 0
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = to.with_suffix(".part")
    with draft.open("wb") as out, shard.open("rb") as file:
        out.write(struct.pack("<Q", len(text)) + text)
        for info in tensors.values():
            file.seek(info.offset)
            for begin in range(0, info.nbytes, COPIED):
                out.write(file.read(min(COPIED, info.nbytes - begin)))
        out.flush()
        os.fsync(out.fileno())
    os.replace(draft, to)
    sync_folder(to.parent)
    return to
