"""What a timeline leaves behind in every layer, and nothing else: its size is known before the first token.

A layer keeps a ring of the last window's K=V; a compressing layer also the tokens of the group being filled and one
entry per full group; a layer with an indexer the same again for the index keys. There is room for the entries of
`capacity` tokens, which doubles on the way to max_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.cache.packed import pack_index, pack_kv, unpack_index, unpack_kv
from dsv4_kernels.compressor import OVERLAPPING, Pending
from dsv4_quant.config import ModelConfig
from dsv4cli.errors import CorruptError, UsageError
from dsv4cli.model.numerics import Numerics
from dsv4cli.model.recording import Recording
from dsv4cli.model.sizes import row_bytes, state_bytes
from dsv4cli.model.step import Step

FIRST_CAPACITY = 1024  # tokens


class Rows(NamedTuple):
    """What caches keep of a key: so many elements of a K=V vector, and of an index key."""

    kv_row: int
    index_row: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, numerics: Numerics, packed: bool) -> Rows:
        if packed:
            return cls(*row_bytes(config, numerics.name, packed=True), torch.uint8)
        return cls(config.head_dim, config.index_head_dim, numerics.cache)


class Ring:
    """The last `window` K=V vectors; token t lies in slot t mod window."""

    def __init__(self, window: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = alloc.empty((window, width), dtype, device)

    def place(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Where the keys [t, d] of a step's tokens are to be written before `push` takes them: rows, and of a live step which of
        them."""
        window, t = len(self.rows), len(step.ids)
        if step.live is not None:
            return self.rows, step.ring_row
        if t == 1:
            slot = step.start % window
            return self.rows[slot:slot + 1], None
        return alloc.empty((t, self.rows.shape[1]), self.rows.dtype, self.rows.device), None

    def push(self, kv: Tensor, step: Step) -> Tensor:
        """Takes what was written to `place`; returns the keys that these tokens see: up to window - 1 tokens before, then
        their own, in order (for t = 1 in the ring's, which a single query does not mind; the whole ring for a live step)."""
        window, t, position = len(self.rows), len(step.ids), step.start
        if step.live is not None:
            return self.rows
        if t == 1:
            return self.rows[:min(position + 1, window)]
        slots = torch.arange(max(0, position - window + 1), position + t, device=kv.device) % window
        recent = torch.cat([self.rows[slots[:-t]], kv])
        self.rows[slots[-min(t, window):]] = recent[-min(t, window):]
        return recent


class Store:
    """Entries [capacity, d] that are only ever appended to; the first `count` are filled."""

    def __init__(self, ratio: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.ratio = ratio
        self.count = 0
        self.rows = alloc.empty((0, width), dtype, device)

    def extend(self, count: int) -> Tensor:
        """Where the next `count` entries are to be written, which are counted as filled from now on."""
        self.count += count
        return self.rows[self.count - count:self.count]

    @property
    def filled(self) -> Tensor:
        return self.rows[:self.count]

    def place(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Where a step writes the entries of the groups that it completes: rows, and of a live step which of them."""
        if step.live is not None:
            return self.rows, step.entry_row(self.ratio)
        return self.extend(len(step.groups(self.ratio).turns)), None

    def seen(self, step: Step) -> Tensor:
        """The entries that a step's tokens may look at; for a live step all that there is room for, filled or not."""
        return self.rows if step.live is not None else self.filled

    def reserve(self, tokens: int) -> None:
        """Makes room for the full groups of so many tokens."""
        rows = alloc.empty((tokens // self.ratio, self.rows.shape[1]), self.rows.dtype, self.rows.device)
        rows[:self.count] = self.filled
        self.rows = rows


@dataclass
class Compressed:
    """A compressor's memory: tokens that wait for their group, and the entries of full groups."""

    pending: Pending
    store: Store

    @classmethod
    def fresh(cls, ratio: int, width: int, row: int, dtype: torch.dtype, device: torch.device) -> Compressed:
        """width: values of a key; row: elements of `dtype` that a store keeps of it."""
        return cls(Pending.fresh(ratio, width, torch.float32, device), Store(ratio, row, dtype, device))

    @property
    def nbytes(self) -> int:
        return self.pending.kv.nbytes + self.pending.scores.nbytes + self.store.rows.nbytes


@dataclass
class LayerState:
    """One layer's memory. `entries` where the layer compresses, `index` where it also has an indexer."""

    ring: Ring
    entries: Compressed | None
    index: Compressed | None

    @classmethod
    def fresh(cls, config: ModelConfig, layer: int, rows: Rows, device: torch.device) -> LayerState:
        ratio = config.ratio(layer)
        return cls(Ring(config.sliding_window, rows.kv_row, rows.dtype, device),
                   Compressed.fresh(ratio, config.head_dim, rows.kv_row, rows.dtype, device) if ratio else None,
                   Compressed.fresh(ratio, config.index_head_dim, rows.index_row, rows.dtype, device)
                   if ratio == OVERLAPPING else None)

    def compressed(self) -> Iterator[tuple[str, Compressed]]:
        parts = {"entries": self.entries, "index": self.index}
        yield from ((name, part) for name, part in parts.items() if part is not None)

    def live(self, position: int) -> Iterator[tuple[str, Tensor]]:
        """Views, by name, of all that matters after `position` tokens."""
        yield "ring", self.ring.rows[:position]
        for name, part in self.compressed():
            yield f"{name}.pending_kv", part.pending.kv
            yield f"{name}.pending_scores", part.pending.scores
            yield f"{name}.rows", part.store.rows[:position // part.store.ratio]

    @property
    def nbytes(self) -> int:
        return self.ring.rows.nbytes + sum(part.nbytes for _, part in self.compressed())


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state after `position` tokens, good for State.restore of any state of the same model."""

    position: int
    contents: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.contents.values())

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the position, by name, in the host's memory; `from_tensors` is the way back, to any device."""
        return {name: tensor.cpu() for name, tensor in self.contents.items()}

    @classmethod
    def from_tensors(cls, position: int, tensors: Mapping[str, Tensor]) -> Snapshot:
        return cls(position, dict(tensors))


class State:
    """The memory of one timeline of at most `max_tokens` tokens; `position` of them have been processed."""

    def __init__(self, config: ModelConfig, max_tokens: int, numerics: Numerics,
                 device: torch.device | str | Sequence[torch.device] = "cpu", *, packed: bool = False) -> None:
        """device: of all layers, or of each. packed: caches hold the bytes of dsv4_kernels.cache.packed, which lose nothing of
        official numerics and are what the Triton kernels read fastest. Raises UsageError for other numerics."""
        if packed and numerics.name != "official":
            raise UsageError(f"Caches of {numerics.name} numerics cannot be packed without loss.", "Use the official ones.")
        self.config = config
        self.max_tokens = max_tokens
        self.numerics = numerics
        self.position = 0
        self.capacity = 0
        self.recording: Recording | None = None  # of this state's memory, where it lies now
        self.torn = False  # a forward pass was interrupted between two layers
        rows = Rows.of(config, numerics, packed)
        devices = [torch.device(device)] * config.num_hidden_layers if isinstance(device, str | torch.device) else device
        self.layers = [LayerState.fresh(config, layer, rows, own) for layer, own in enumerate(devices)]

    @property
    def nbytes(self) -> int:
        """Bytes held now: what bytes_for says for `capacity` tokens."""
        return sum(layer.nbytes for layer in self.layers)

    @staticmethod
    def bytes_for(config: ModelConfig, tokens: int, numerics: str, *, packed: bool = False) -> int:
        """Bytes of a state with room for so many tokens, without making one."""
        return state_bytes(config, tokens, numerics, packed=packed)

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in all. Raises UsageError when they are more than max_tokens."""
        if tokens > self.max_tokens:
            raise UsageError(f"{tokens} tokens do not fit into a state of {self.max_tokens}.",
                             "Open the model with a larger context, or shorten the prompt.")
        if tokens > self.capacity:
            self.recording = None  # storage moves
            self.capacity = min(self.max_tokens, max(tokens, 2 * self.capacity, FIRST_CAPACITY))
            for layer in self.layers:
                for _, part in layer.compressed():
                    part.store.reserve(self.capacity)

    def snapshot(self) -> Snapshot:
        """A copy of what the next token depends on. Raises UsageError while the state is torn."""
        self.demand_whole()
        return Snapshot(self.position, {name: tensor.clone() for name, tensor in self._live(self.position)})

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot) -> None:
        """Goes (back or forth) to the snapshot's place; what follows is bitwise what followed there. Of official numerics, packed
        snapshots serve states that are not, and the other way round.

        Raises CorruptError when the snapshot's tensors are not those of this model at this position, UsageError when
        the position is beyond max_tokens; the state is then unchanged.
        """
        self.reserve(snapshot.position)
        wanted = dict(self._live(snapshot.position))
        contents = {name: repacked(tensor, name, wanted[name].dtype, self.config.qk_rope_head_dim)
                    if name in wanted else tensor for name, tensor in snapshot.contents.items()}
        _demand_same(wanted, contents)
        for name, tensor in wanted.items():
            tensor.copy_(contents[name])
        self.moved(snapshot.position)
        self.torn = False

    def moved(self, position: int) -> None:
        """From now on the state is that of `position` tokens, whose entries are where they belong."""
        for layer in self.layers:
            for _, part in layer.compressed():
                part.store.count = position // part.store.ratio
        self.position = position

    def demand_whole(self) -> None:
        """Raises UsageError when a forward pass over this state did not come to its end."""
        if self.torn:
            raise UsageError("This state was left between two layers when its last pass was interrupted.",
                             "Restore a snapshot or start from a new state.")

    def _live(self, position: int) -> Iterator[tuple[str, Tensor]]:
        for number, layer in enumerate(self.layers):
            yield from ((f"layers.{number}.{name}", tensor) for name, tensor in layer.live(position))


def repacked(rows: Tensor, name: str, dtype: torch.dtype, rotated: int) -> Tensor:
    """Rows of the cache called `name` in the form of another: packed as bytes or not; what is in no such form stays as it is."""
    index = name.startswith("index") or ".index." in name
    if torch.uint8 not in (rows.dtype, dtype) or rows.dtype == dtype:
        return rows
    try:
        if dtype == torch.uint8:
            return pack_index(rows) if index else pack_kv(rows, rotated)
        return (unpack_index(rows) if index else unpack_kv(rows, rotated)).to(dtype)
    except ValueError as failure:
        raise CorruptError(f"The snapshot's {name} are no rows of official numerics: {failure}.", OTHERS) from None


OTHERS = "The snapshot belongs to another model, other numerics or another version; start anew."


def _demand_same(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() ^ given.keys()):
        raise CorruptError(f"The snapshot {'lacks' if name in wanted else 'has an unknown'} tensor {name}.", OTHERS)
    for name, tensor in wanted.items():
        other = given[name]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise CorruptError(f"The snapshot's {name} is {other.dtype} {list(other.shape)}, but {tensor.dtype} "
                               f"{list(tensor.shape)} is needed.", OTHERS)
