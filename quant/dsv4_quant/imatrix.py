"""Importance matrices: how much an error in each column of a matrix matters, as mean squares of what met the column.

llama.cpp keeps them in two ways. As a GGUF: for every matrix `NAME.in_sum2` [matrices, columns] (sums of squared
activations, a row for each expert of a stack) and `NAME.counts` [matrices, 1] (how many tokens came). In the older .dat: for
every tensor its name, a count of calls and the sums, scaled so that dividing by that count gives means. Both are read,
the GGUF is written.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile, WrongUse
from dsv4_quant.files import gguf_header, gguf_writer
from dsv4_quant.files.mapping import forget, map_file, typed_view
from dsv4_quant.files.source import Source
from dsv4_quant.metadata import WEIGHT_ENERGY
from dsv4_quant.schema import GgufSpec, gguf_tensors

SUMS, COUNTS = ".in_sum2", ".counts"
VIEWS = (" (reshaped)", " (view)", " (cont)")  # what llama.cpp appends to a weight's name when it looks at it differently
LONGEST_NAME, MOST_ENTRIES = 4096, 1 << 20
DAMAGED = "The imatrix is truncated or damaged; get it again, or collect one with dsv4 imatrix."


@dataclass(frozen=True)
class Entry:
    """Of one tensor: sums float32 [matrices, columns] of squares, counts float32 [matrices] of the tokens in them.

    `flat`: an old file does not say how many matrices a tensor has; then sums are [1, matrices * columns].
    """

    sums: Tensor
    counts: Tensor
    flat: bool = False

    def means(self, matrix: int | None) -> Tensor:
        """float32 [columns] of one matrix, or of all together. Where no token came, every column counts the same."""
        if matrix is None:
            total = float(self.counts.sum())
            return self.sums.sum(0) / total if total else torch.ones(self.sums.shape[1])
        count = float(self.counts[matrix])
        return self.sums[matrix] / count if count else torch.ones(self.sums.shape[1])


@dataclass(frozen=True)
class Imatrix:
    """A file's content. Values are mapped and read when they are asked for."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: Sequence[str] = ()
    chunks: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, config: ModelConfig | None = None) -> Imatrix:
        """Reads either form. With a configuration, what the file says of each tensor must fit the model's.

        Raises CorruptFile for a file that is neither or is damaged, WrongUse for one of another model.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                magic = file.read(4)
            found = _read_gguf(path) if magic == gguf_header.MAGIC else _read_legacy(path)
        except OSError as error:
            raise CorruptFile(f"{path} cannot be read: {error.strerror or error}.", "Check its path.") from None
        return found if config is None else found.of_model(config)

    @property
    def keys(self) -> dict[str, Any]:
        """What a quantised file says about it, behind "quantize.imatrix."."""
        return {"file": self.path.name, "dataset": ", ".join(self.datasets) or "unknown",
                "entries_count": len(self.entries), "chunks_count": self.chunks}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, in hex."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def for_tensor(self, name: str, expert: int | None) -> Tensor | None:
        """float32 [columns] for a GGUF tensor, or for one expert of a stack; None where the file does not have it.

        Mean squares. An expert that no token visited has 1 everywhere; without an expert a stack is taken together.
        Raises WrongUse for an expert that the stack does not have.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if expert is not None and expert >= len(entry.counts):
            raise WrongUse(f"{self.path} has {len(entry.counts)} matrices of {name}, but expert {expert} was asked for.",
                           "Collect one for this model with dsv4 imatrix.")
        return entry.means(expert)

    def of_model(self, config: ModelConfig) -> Imatrix:
        """The same, with the tensors of older files cut into their experts. Raises WrongUse naming a shape that differs."""
        found = dict(self.entries)
        for spec in gguf_tensors(config):
            if spec.name in found:
                found[spec.name] = self._fitted(spec, found[spec.name])
        if not any(spec.name in found for spec in gguf_tensors(config)):
            raise WrongUse(f"{self.path} knows no tensor of this model; its first is {min(found, default='none')}.",
                           "It was collected for another architecture; dsv4 imatrix makes one for this model.")
        return Imatrix(self.path, found, self.datasets, self.chunks, self.metadata)

    def _fitted(self, spec: GgufSpec, entry: Entry) -> Entry:
        stack, columns = spec.shape[0] if len(spec.shape) == 3 else None, spec.shape[-1]
        matrices, width = entry.sums.shape
        if entry.flat and stack is not None and width == stack * columns:
            return Entry(entry.sums.view(stack, columns), entry.counts.expand(stack))
        if width != columns or (stack is not None and matrices != stack):
            raise WrongUse(
                f"{self.path} is of another model: its {spec.name} is {matrices} x {width}, "
                f"this model's needs {stack or 1} x {columns}.",
                "Collect one for this model with dsv4 imatrix.")
        return entry


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_gguf(path: Path) -> Imatrix:
    part = gguf_header.read(path)
    if part.metadata.get("general.type") != "imatrix":
        raise CorruptFile(f"{path} is a GGUF, but no imatrix: its type is {part.metadata.get('general.type')!r}.",
                          "Give the file that llama-imatrix or dsv4 imatrix wrote.")
    file = map_file(path)

    def values(name: str) -> Tensor:
        info = part.tensors.get(name)
        if info is None or info.dtype != "f32":
            raise CorruptFile(f"{path}: {name} is {'absent' if info is None else info.dtype}, not f32.", DAMAGED)
        found = typed_view(file, info.offset, info.nbytes, torch.float32).view(info.shape)
        return found.view(-1, info.shape[-1])

    entries = {}
    for stored in part.tensors:
        if stored.endswith(SUMS):
            name = stored.removesuffix(SUMS)
            sums, counts = values(stored), values(name + COUNTS).flatten()
            if len(sums) != len(counts):
                raise CorruptFile(f"{path}: {name} has {len(sums)} rows of sums, but {len(counts)} counts.", DAMAGED)
            _demand_sane(path, name, sums, counts)
            entries[_plain(name)] = Entry(sums, counts)
    said = part.metadata.get("imatrix.datasets", [])
    datasets = [str(each) for each in said] if isinstance(said, list) else [str(said)]
    chunks = part.metadata.get("imatrix.chunk_count", 0)
    return Imatrix(path, entries, datasets, chunks if isinstance(chunks, int) else 0, part.metadata)


def _read_legacy(path: Path) -> Imatrix:
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Legacy(path, file, size)
        entries = reader.entries()
        chunks, dataset = reader.trailer()
    return Imatrix(path, entries, [dataset] if dataset else [], chunks)


@dataclass
class _Legacy:
    """Walks a .dat file, and believes no count that the file is too short for."""

    path: Path
    file: BinaryIO
    size: int

    def entries(self) -> dict[str, Entry]:
        count = self.number()
        if not 1 <= count <= MOST_ENTRIES:
            raise CorruptFile(f"{self.path} is no imatrix: neither a GGUF nor llama.cpp's older form.", DAMAGED)
        return dict(self.entry() for _ in range(count))

    def entry(self) -> tuple[str, Entry]:
        name = self.bytes(self.length(LONGEST_NAME, "a name")).decode("utf-8", "replace")
        calls, values = self.number(), self.length(self.size // 4, f"the values of {name}")
        sums = torch.frombuffer(bytearray(self.bytes(4 * values)), dtype=torch.float32)[None]
        counts = torch.tensor([float(max(calls, 1))])  # no calls: the values are means already
        _demand_sane(self.path, name, sums, counts)
        return _plain(name), Entry(sums, counts, flat=True)

    def trailer(self) -> tuple[int, str]:
        """How many chunks there were, and of what text; the oldest files end without either."""
        if self.file.tell() + 8 > self.size:
            return 0, ""
        chunks = self.number()
        return chunks, self.bytes(self.length(LONGEST_NAME, "the text's name")).decode("utf-8", "replace")

    def length(self, most: int, what: str) -> int:
        found = self.number()
        if not 1 <= found <= most:
            raise CorruptFile(f"{self.path}: {what} has the length {found}.", DAMAGED)
        return found

    def number(self) -> int:
        found: int = struct.unpack("<i", self.bytes(4))[0]
        return found

    def bytes(self, count: int) -> bytes:
        at = self.file.tell()
        if count > self.size - at:
            raise CorruptFile(f"{self.path} ends at byte {self.size}, {count} bytes are missing from {at} on.", DAMAGED)
        return self.file.read(count)


def _plain(name: str) -> str:
    for view in VIEWS:
        name = name.removesuffix(view)
    return name


def _demand_sane(path: Path, name: str, sums: Tensor, counts: Tensor) -> None:
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()):
        raise CorruptFile(f"{path}: {name} was met {float(counts.min())} times.", DAMAGED)
    for piece in sums.split(64):
        if not bool(torch.isfinite(piece).all()) or bool((piece < 0).any()):
            raise CorruptFile(f"{path}: {name} has squares that are negative or no numbers.", DAMAGED)


# ---- writing -------------------------------------------------------------------------------------------------------


def write(path: Path, entries: Mapping[str, Entry], *, datasets: Sequence[str], chunks: int, chunk_size: int,
          more: Sequence[gguf_writer.Entry] = ()) -> None:
    """Writes the GGUF form to `path`, which the caller brings to the disk and renames. `more`: keys beside llama.cpp's own."""
    keys = [gguf_writer.Entry("general.type", "str", "imatrix"),
            gguf_writer.Entry("imatrix.datasets", "[str]", list(datasets)),
            gguf_writer.Entry("imatrix.chunk_count", "u32", chunks),
            gguf_writer.Entry("imatrix.chunk_size", "u32", chunk_size), *more]
    tensors = list(_stored(entries))
    places, offset = [], 0
    for name, values in tensors:
        places.append(gguf_writer.Place(name, tuple(values.shape), "f32", offset))
        offset += gguf_writer.aligned(values.nbytes)
    with path.open("wb") as file:
        file.write(gguf_writer.header(keys, places))
        for _, values in tensors:
            data = values.contiguous().numpy().data.cast("B")
            file.write(data)
            file.write(bytes(gguf_writer.aligned(len(data)) - len(data)))


def _stored(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    for name, entry in sorted(entries.items()):
        yield name + SUMS, entry.sums
        yield name + COUNTS, entry.counts.float()[:, None]


# ---- without one ---------------------------------------------------------------------------------------------------


class WeightEnergy:
    """What stands in where nothing was collected: a column matters as much as the mean square of its weights.

    Answers as an Imatrix does, and says what it is in the file that is written with it.
    """

    fingerprint = "weight energy"
    ROWS = 1024  # decoded at a time
    KNOWN = 64  # kept: a large matrix is asked for once for each of its pieces

    def __init__(self, source: Source) -> None:
        self.source = source
        self.keys: dict[str, Any] = dict(WEIGHT_ENERGY)
        self._known: dict[tuple[str, int | None], Tensor] = {}
        self._official = {spec.name: spec.official for spec in gguf_tensors(source.config) if len(spec.shape) > 1}

    def for_tensor(self, name: str, expert: int | None) -> Tensor | None:
        """float32 [columns] for a GGUF tensor or one expert of a stack; None for what is no matrix of this model."""
        parts = self._official.get(name)
        if parts is None or (expert is not None and expert >= len(parts)):
            return None
        energy = self._known.get((name, expert))
        if energy is None:
            chosen = parts if expert is None else parts[expert:expert + 1]
            energy = torch.stack([self._energy(official) for official in chosen]).mean(0)
            if len(self._known) >= self.KNOWN:
                self._known.clear()
            self._known[name, expert] = energy
        return energy

    def _energy(self, official: str) -> Tensor:
        weight = self.source.read(official)
        rows, total = weight.shape[0], torch.zeros(weight.shape[1], dtype=torch.float64)
        for start in range(0, rows, self.ROWS):
            chosen = slice(start, min(start + self.ROWS, rows))
            total += weight.rows(chosen).double().square().sum(0)
            forget(weight.data[chosen])
        return (total / rows).float()
