"""How the sources of a plan's pieces are spread over shards, and what disk it takes to convert those one after another.

Official checkpoints have a layer in each shard. Others cut anywhere: a weight may lie in another shard than its scale. Tensors
that wait for a later shard are kept when theirs goes, and take room beside the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import groupby
from typing import NamedTuple

from dsv4_quant.files.info import TensorInfo
from dsv4_quant.files.official import OfficialSource
from dsv4_quant.plan import Piece
from dsv4_quant.quantize import officials

Shards = frozenset[str]


class Unit(NamedTuple):
    """The pieces of one matrix, which need the same tensors."""

    pieces: tuple[Piece, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def units(pieces: Iterable[Piece], source: OfficialSource) -> Iterator[Unit]:
    """The pieces, which come in the order of their plan, by matrix."""
    for _, same in groupby(pieces, key=lambda piece: (piece.target.name, piece.expert)):
        chosen = tuple(same)
        tensors: dict[str, TensorInfo] = {}
        for name in officials(chosen[0]):
            tensors |= source.stored(name)
        yield Unit(chosen, tensors)


class Spread:
    """Bytes of the output by the shards they need, and bytes of each shard that wait for others."""

    def __init__(self, pieces: Iterable[Piece], source: OfficialSource) -> None:
        self.written: Counter[Shards] = Counter()
        self.waiting: Counter[tuple[str, Shards]] = Counter()
        for unit in units(pieces, source):
            shards = frozenset(info.file.name for info in unit.tensors.values())
            self.written[shards] += unit.nbytes
            if len(shards) > 1:
                for info in unit.tensors.values():
                    self.waiting[info.file.name, shards] += info.nbytes

    def unwritten(self, gone: Set[str]) -> int:
        """Bytes of the output that cannot have been written when only the shards `gone` have been here."""
        return sum(nbytes for shards, nbytes in self.written.items() if not shards <= gone)

    def kept(self, shard: str) -> int:
        """Bytes of a shard that may have to be kept when it goes."""
        return sum(nbytes for (one, _), nbytes in self.waiting.items() if one == shard)

    def peak(self, sizes: Mapping[str, int]) -> int:
        """The most bytes on the disk when shards of these sizes come in this order, two at a time wherever that takes no more
        than the output and twice the largest."""
        needed = {shard for shards in self.written for shard in shards}
        wanted = {shard: size for shard, size in sizes.items() if shard in needed}
        total = sum(self.written.values())
        most = total + sum(sorted(wanted.values(), reverse=True)[:2])
        gone: set[str] = set()
        for shard, size in wanted.items():
            kept = sum(nbytes for (one, needed), nbytes in self.waiting.items() if one in gone and not needed <= gone)
            gone.add(shard)
            most = max(most, total - self.unwritten(gone) + kept + size + self.kept(shard))
        return most
