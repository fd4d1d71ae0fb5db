"""What a conversion will write, to the byte, from the source's header alone: no weight is read, no torch imported.

A file's header goes before its data, so every type, offset and size is settled here. The work is cut into pieces (some rows
of one matrix) that can be done in any order, and are always cut alike, so that an interrupted conversion finds its place.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from dsv4_quant import metadata, recipe, schema
from dsv4_quant.errors import UnsupportedModel, WrongUse
from dsv4_quant.files.gguf_writer import Entry, Place, aligned, header, row_bytes
from dsv4_quant.files.headers import Header
from dsv4_quant.fit import Group, fit, smallest
from dsv4_quant.metadata import Origin
from dsv4_quant.recipe import KEEP, Recipe, Rule
from dsv4_quant.schema import GgufSpec, Variant
from dsv4_quant.stages import stage_tensors

# Weights of a piece: a few of them, as floats and what an encoder makes of them, are all that is in memory.
PIECE = 1 << 21
STORED = {"I8": "fp4", "F8_E4M3": "fp8_e4m3"}
# What takes the place of types that GGUFs lack or avoid.
KEPT = {"fp4": "mxfp4", "fp8_e4m3": "q8_0", "i64": "i32", "f64": "f32"}
EXPERTS = ("gate_up", "down")
Stages = Literal["none", "mtp", "dspark"]


@dataclass(frozen=True)
class Target:
    """A tensor to write: `nbytes` bytes of `type` from `offset` of part `part`; `stored` is the type it has in the source."""

    name: str
    shape: tuple[int, ...]
    type: str
    slot: str
    role: str
    official: tuple[str, ...]
    stored: str
    part: int = 0
    offset: int = 0

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of a matrix, of an expert's where experts are stacked; a vector is one row."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.experts * self.rows * row_bytes(self.type, self.columns)

    @property
    def weighed(self) -> bool:
        """Whether the importance of a column can make a difference; not to what is copied, or rounded number by number."""
        return self.type in recipe.TYPES and self.type not in (*recipe.UNWEIGHED, KEPT.get(self.stored, self.stored))


class Piece(NamedTuple):
    """Rows `first` .. `first + rows` of a matrix of a target, and where in the part they go."""

    number: int
    target: Target
    expert: int
    first: int
    rows: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.rows * row_bytes(self.target.type, self.target.columns)


@dataclass(frozen=True)
class Part:
    """A file of the output."""

    path: Path
    head: bytes
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """All that will be written."""

    source: Header
    output: Path
    targets: tuple[Target, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def weighed(self) -> bool:
        """Whether anything is searched for with an importance of its columns."""
        return any(target.weighed for target in self.targets)

    @cached_property
    def pieces(self) -> int:
        return sum(target.experts * -(-target.rows // _rows_at_once(target)) for target in self.targets)

    def each_piece(self) -> Iterator[Piece]:
        """Every piece, in the order of the files."""
        number = 0
        for target in self.targets:
            step, width = _rows_at_once(target), row_bytes(target.type, target.columns)
            for expert in range(target.experts):
                for first in range(0, target.rows, step):
                    rows = min(step, target.rows - first)
                    offset = target.offset + (expert * target.rows + first) * width
                    yield Piece(number, target, expert, first, rows, offset)
                    number += 1

    def fingerprint(self, *more: str) -> str:
        """A hex digest of all that decides about the bytes: source files, types, metadata, and `more`."""
        digest = hashlib.sha256(f"{PIECE}".encode())
        for path in sorted({info.file for info in self.source.tensors.values()}):
            digest.update(f"{self.source.stamps.get(path) or _stamp(path)}\n".encode())
        for part in self.parts:
            digest.update(part.head)
        digest.update("\n".join(more).encode())
        return digest.hexdigest()


def _stamp(path: Path) -> str:
    """What tells a file from others."""
    seen = path.stat()
    return f"{path.resolve()} {seen.st_size} {seen.st_mtime_ns}"


def make_plan(
    source: Header,
    output: Path,
    chosen: Recipe,
    origin: Origin,
    *,
    changes: Sequence[Rule] = (),
    stages: Stages = "none",
    target_size: int | None = None,
    part_size: int | None = None,
) -> Plan:
    """The plan of a conversion: the trunk, or the drafting stages that `stages` names.

    `changes` come after the recipe's rules; with `target_size` the experts they say nothing of get types that make the whole
    fit. Raises WrongUse for layers that are not there, rows that no block of their type fills and sizes that cannot be reached;
    UnsupportedModel for stages that the source lacks.
    """
    variant = _variant(source, stages)
    specs = list(_specs(source, variant))
    _check_layers(specs, changes)
    rules = chosen.changed(changes)
    targets = [_target(source, spec, rules) for spec in specs]
    if target_size is not None:
        head = _entries(source, variant, specs, targets, origin)
        targets = _fitted(targets, changes, target_size - _size(head, targets, part_size), target_size)
    for target in targets:
        _check_rows(target)
    if not origin.imatrix and any(target.weighed for target in targets):
        origin = replace(origin, imatrix=metadata.WEIGHT_ENERGY)
    return _laid_out(source, output, _entries(source, variant, specs, targets, origin), targets, part_size)


def _variant(source: Header, stages: Stages) -> Variant:
    if source.layout == "gguf":
        if stages != "none":
            raise UnsupportedModel(
                f"{source.path} is a GGUF; its drafting stages are a file of their own already.",
                "Give the folder of the official checkpoint.",
            )
        return Variant()
    found = Variant.of(source.tensors)
    if stages not in ("none", found.stages):
        has = "no drafting stages" if found.stages == "none" else f"{found.stages} stages, not {stages}"
        hint = "" if found.stages == "none" else f"Use --{found.stages}."
        raise UnsupportedModel(f"{source.path} has {has}.", hint)
    return replace(found, stages=stages)


def _specs(source: Header, variant: Variant) -> Iterator[GgufSpec]:
    if variant.stages == "none":
        return schema.gguf_tensors(source.config)
    return stage_tensors(source.config, variant, str(source.path))


def _target(source: Header, spec: GgufSpec, rules: Recipe) -> Target:
    info = source.tensors[spec.name if source.layout == "gguf" else spec.official[0]]
    stored, slot = STORED.get(info.dtype, info.dtype.lower()), recipe.slot_of(spec.name)
    kind = rules.type_of(slot, recipe.layer_of(spec.name))
    if kind == KEEP:
        floats = len(spec.shape) == 1 and stored not in ("i64", "i32")
        kind = "f32" if floats else KEPT.get(stored, stored)
    return Target(spec.name, spec.shape, kind, slot, spec.role, spec.official, stored)


def _check_layers(specs: Sequence[GgufSpec], changes: Iterable[Rule]) -> None:
    layers = {layer for spec in specs if (layer := recipe.layer_of(spec.name)) is not None}
    for rule in changes:
        if rule.last is not None and not {rule.first, rule.last} <= layers:
            which = f"layer {rule.first}" if rule.first == rule.last else f"layers {rule.first} to {rule.last}"
            raise WrongUse(
                f"--{_option(rule.slot)}: there is no {which}, the file has layers {min(layers)} to {max(layers)}.",
                "Choose among these.",
            )


def _check_rows(target: Target) -> None:
    if target.type not in (fits := recipe.fitting(target.columns)) and target.type in recipe.TYPES:
        raise WrongUse(
            f"Rows of {target.name} have {target.columns} elements, which are no whole blocks of {target.type}.",
            f"Types that fit: {', '.join(fits)}. Choose one with --{_option(target.slot)}.",
        )


def _option(slot: str) -> str:
    """The narrowest option that sets a slot's type."""
    return min(
        (role for role, slots in recipe.ROLES.items() if slot in slots),
        key=lambda role: len(recipe.ROLES[role]),
        default=slot,
    )


def _fitted(targets: list[Target], changes: Sequence[Rule], room: int, wanted: int) -> list[Target]:
    """The targets, with types for the experts that `changes` say nothing of. `room` is what is left for those."""
    free = [
        t
        for t in targets
        if t.slot in EXPERTS and not any(rule.holds(t.slot, recipe.layer_of(t.name)) for rule in changes)
    ]
    room += sum(aligned(target.nbytes) for target in free)
    groups = []
    for slot, layer in sorted({(target.slot, recipe.layer_of(target.name) or 0) for target in free}):
        same = [target for target in free if (target.slot, recipe.layer_of(target.name) or 0) == (slot, layer)]
        exact = KEPT.get(same[0].stored, same[0].stored)
        rows = sum(target.experts * target.rows for target in same)
        room -= len(same) * (aligned(1) - 1)
        groups.append(Group(slot, layer, same[0].columns, rows, exact))
    if room < (least := smallest(groups)):
        raise WrongUse(
            f"{wanted:,} bytes are too few: the smallest types make {wanted - room + least:,}.",
            "Choose a larger --target-size, or smaller types for what it does not choose.",
        )
    rules = Recipe("", tuple(fit(groups, room)))
    kinds = {target.name: rules.type_of(target.slot, recipe.layer_of(target.name) or 0) for target in free}
    return [replace(target, type=kinds.get(target.name, target.type)) for target in targets]


def _entries(
    source: Header, variant: Variant, specs: Sequence[GgufSpec], targets: Sequence[Target], origin: Origin
) -> list[Entry]:
    kinds: Counter[str] = Counter()
    for target in targets:
        kinds[target.type] += target.weights * (target.slot in EXPERTS)
    commonest = kinds.most_common(1)[0][0]
    return metadata.entries(source, variant, specs, commonest if commonest in metadata.FILE_TYPES else "f32", origin)


def _size(entries: list[Entry], targets: Sequence[Target], part_size: int | None) -> int:
    parts = _parts(targets, len(header(entries, [])), part_size)
    return sum(
        len(_head(entries if number == 0 else [], number, len(parts), len(targets), part))
        + sum(aligned(target.nbytes) for target in part)
        for number, part in enumerate(parts)
    )


def _laid_out(
    source: Header, output: Path, entries: list[Entry], targets: Sequence[Target], part_size: int | None
) -> Plan:
    """Targets with their places, and the headers that say so."""
    split = _parts(targets, len(header(entries, [])), part_size)
    parts, placed = [], []
    for number, part in enumerate(split):
        head = _head(entries if number == 0 else [], number, len(split), len(targets), part)
        at = len(head)
        for target in part:
            placed.append(replace(target, part=number, offset=at))
            at += aligned(target.nbytes)
        path = output
        if len(split) > 1:
            path = output.with_name(f"{output.stem}-{number + 1:05d}-of-{len(split):05d}.gguf")
        parts.append(Part(path, head, at))
    return Plan(source, output, tuple(placed), tuple(parts))


def _head(entries: Sequence[Entry], number: int, count: int, tensors: int, targets: Iterable[Target]) -> bytes:
    places, at = [], 0
    for target in targets:
        places.append(Place(target.name, target.shape, target.type, at))
        at += aligned(target.nbytes)
    split = []
    if count > 1:
        split = [
            Entry("split.no", "u16", number), Entry("split.count", "u16", count), Entry("split.tensors.count", "i32", tensors),
        ]  # fmt: skip
    return header([*entries, *split], places)


def _parts(targets: Sequence[Target], keys: int, part_size: int | None) -> list[list[Target]]:
    """The targets cut into files of at most `part_size` bytes, as far as a tensor is not larger by itself."""
    parts: list[list[Target]] = [[]]
    left = (part_size or 0) - keys
    for target in targets:
        size = aligned(target.nbytes) + len(target.name) + 64  # what its line in the header may take
        if part_size is not None and parts[-1] and size > left:
            parts.append([])
            left = part_size
        parts[-1].append(target)
        left -= size
    return parts


def _rows_at_once(target: Target) -> int:
    return max(1, PIECE // target.columns)
