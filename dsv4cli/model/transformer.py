"""DeepSeek-V4: embed, spread over the streams, layers, merge the streams, norm, head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.hyper import HyperSettings, merge_streams
from dsv4_kernels.linear import Norm, embed, linears
from dsv4_kernels.residual import Joined
from dsv4_quant.config import ModelConfig
from dsv4_quant.files import Source
from dsv4_quant.formats import Packed
from dsv4cli.errors import UsageError
from dsv4cli.model.block import Block
from dsv4cli.model.experts import Place, TieredExperts, Tiers
from dsv4cli.model.files import MappedFiles
from dsv4cli.model.numerics import Numerics, numerics_named
from dsv4cli.model.recording import ByHost, Recording, recorder
from dsv4cli.model.sizes import EXPAND_LIMIT
from dsv4cli.model.slots import Room
from dsv4cli.model.state import State
from dsv4cli.model.step import Rope, Step
from dsv4cli.model.weights import ModelWeights, bind

PIECE = 1024  # tokens that pass through all layers together; bounds the memory of a prompt of any length

Logits = Literal["last", "all", "none"]


class Model:
    """The trunk with its weights. Immutable; what changes with the tokens is in a State."""

    def __init__(self, weights: ModelWeights, config: ModelConfig, numerics: Numerics, files: MappedFiles | None = None, *,
                 records: bool = True, tiers: TieredExperts | None = None) -> None:
        """files: those that weights are mapped from, if any are. records: whether decoded tokens may be CUDA graphs or tapes.
        tiers: of routed experts that lie in several places; then the host has its part in each layer that is not whole on its
        card."""
        self.weights = weights
        self.tiers = tiers
        self.config = config
        self.numerics = numerics
        self.files = files
        self.records = records
        self.device = weights.norm.device
        self.devices = [layer.attn_norm.device for layer in weights.layers]
        self.ropes = {device: Rope.of(config).to(device) for device in {*self.devices}}
        self.landings: dict[torch.device, Landing] = {}
        readers = [*(layer.hc_attn for layer in weights.layers[1:]), weights.hc_head]
        each: Sequence[Tiers | None] = tiers.layers if tiers else [None] * len(weights.layers)
        self.blocks = [Block(layer, config, number, numerics, reader.fn.to(layer.attn_norm.device), own)
                       for number, (layer, reader, own) in enumerate(zip(weights.layers, readers, each, strict=True))]
        # of what kind a decoded token is; all indexers choose as many entries of as many tokens
        self._ratios = sorted({block.attention.ratio for block in self.blocks if block.attention.ratio})
        self._indexer = next((block.attention.indexer for block in self.blocks if block.attention.indexer), None)

    @classmethod
    def bind(cls, source: Source, *, numerics: str = "official", expand_limit: int = EXPAND_LIMIT,
             device: str = "cpu", records: bool = True, rooms: Sequence[Room] = (),
             wanted: Iterable[Place] | None = None) -> Model:
        """Binds the trunk's weights; packed ones stay views of the source's files, or are copied to `device` as stored.

        numerics: "plain" or "official". expand_limit: bytes of float32 weights up to which the model is decoded once.
        records: whether the launches of decoded tokens are recorded and replayed; without, each is described anew.
        rooms: where these are given, they have all layers between them; routed experts that are not expanded stay in the files,
        and as many as there are slots for are copied there, beside the layers' other weights. wanted: which, the dearest first.
        Raises CorruptFile for a missing tensor, a wrong shape or a file that changes meanwhile, UsageError for unknown numerics.
        """
        chosen, files = numerics_named(numerics), MappedFiles(source)
        devices = [room.device for room in rooms for _ in range(room.first, room.last)]
        weights = bind(source, expand_limit, exact=chosen.exact, device=device, devices=devices)
        tiers = None
        if rooms and isinstance(weights.layers[0].moe.experts[0].w1, Packed):
            tiers = TieredExperts([layer.moe.experts for layer in weights.layers], rooms,
                                  source.config.num_experts_per_tok, wanted)
        files.demand_unchanged()
        stay = tiers is not None or weights.norm.device.type == "cpu"
        return cls(weights, source.config, chosen, files if stay else None, records=records, tiers=tiers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as held: packed as in the file, or expanded."""
        return self.weights.nbytes

    def new_state(self, max_tokens: int) -> State:
        """An empty timeline with room for max_tokens tokens; on a card its caches are packed where that loses nothing."""
        return State(self.config, max_tokens, self.numerics, self.devices, packed=self.packs)

    @property
    def packs(self) -> bool:
        """Whether the caches of new states are packed."""
        return self.device.type == "cuda" and self.numerics.name == "official"

    def forward(self, ids: Tensor, state: State, *, logits: Logits = "last") -> Tensor:
        """Processes ids int64 [t] at positions state.position .. + t, and moves the state behind them.

        The ids come from the host; the logits are on the model's device.
        -> float32 logits [1, vocab] of the last token, [t, vocab] of all, or [0, vocab] for "none". However the ids are
        cut into calls, the logits are the same up to float32 rounding. Raises UsageError when the ids do not fit into
        the state, are empty or outside the vocabulary, or when an earlier call on this state was interrupted;
        CorruptFile when a file of weights changed or could not be read meanwhile.
        """
        self._check(ids, state)
        state.reserve(state.position + len(ids))
        with torch.inference_mode(), self.tiers.computing() if self.tiers else nullcontext():
            rows = list(self._rows(ids.to(self.devices[0]).split(PIECE), state, logits))
        if self.files is not None:
            self.files.demand_unchanged()
        # Joined outside of inference mode, so that the caller may write into its logits.
        return torch.cat(rows) if rows else torch.zeros(0, self.config.vocab_size, device=self.device)

    def _rows(self, pieces: Sequence[Tensor], state: State, logits: Logits) -> Iterator[Tensor]:
        """Moves the state over the pieces; yields the logits that were asked for and computes no others."""
        for number, piece in enumerate(pieces, 1):
            wanted = len(piece) if logits == "all" else int(logits == "last" and number == len(pieces))
            state.torn = True
            if len(piece) == 1 and backends.asks_ahead():
                for block in self.blocks:
                    block.moe.ask_for(int(piece))
            if len(piece) == 1 and self._repeats(piece.device.type):
                rows = self._repeated(piece, state, wanted)
                state.moved(state.position + 1)
            else:
                step = Step.at(piece, state.position, self.ropes[piece.device])
                streams = self._embedded(piece)  # like the step, there longer than the queue
                with _queued(piece):
                    rows = self._computed(streams, step, state, wanted)
                state.position += len(piece)
            state.torn = False
            if wanted:
                yield rows

    def _repeats(self, device: str) -> bool:
        """Whether a single token may be computed as an earlier one was. Where the CPU computes all of it, there is no host that
        would have a part of its own."""
        return backends.repeatable(device) and (self.tiers is None or not backends.on_tape(device))

    def _repeated(self, ids: Tensor, state: State, wanted: int) -> Tensor:
        """Logits of a single token, whose launches may be those of an earlier one."""
        position = state.position
        full = tuple(ratio for ratio in self._ratios if (position + 1) % ratio == 0)
        chooses = self._indexer is not None and self._indexer.chooses(position + 1)

        layout = self.tiers.layout if self.tiers else 0
        if state.recording is None or state.recording.layout != layout:
            state.recording = Recording(self.devices[0], recorder if self.records else _nothing, layout)

        def compute(ids: Tensor, live: Tensor, by_host: ByHost) -> Tensor:
            with _queued(ids):  # which is nothing where a tape or a graph is recorded
                step = Step.at(ids, position, self.ropes[ids.device], live, by_host)
                return self._computed(self._embedded(ids), step, state, wanted)

        rows = state.recording.run((full, chooses, wanted), ids, position, compute)
        if self.tiers is not None:
            self.tiers.count_whole()
        return rows

    def _embedded(self, ids: Tensor) -> Tensor:
        """ids [t] -> streams [t, hc_mult, hidden], all alike."""
        return embed(ids, self.weights.embed, self.config.hc_mult)

    def _computed(self, streams: Tensor, step: Step, state: State, wanted: int) -> Tensor:
        """Moves the state over a step; logits [wanted, vocab] of its last tokens, or what is left of the streams."""
        given = Joined(streams)
        for block, layer, device in zip(self.blocks, state.layers, self.devices, strict=True):
            if device != given.streams.device:
                given, step = self._crossed(given, step, device)
            with self._on(device):
                given = block(given, step, layer)
        with self._on(self.device):
            return self._head(given, wanted) if wanted else given.streams

    def _crossed(self, given: Joined, step: Step, device: torch.device) -> tuple[Joined, Step]:
        """Streams and step on the card of the next layers. What is recorded finds them in memory of their own there."""
        live = step.live
        if live is None:
            return moved(given, device), step.to(device, self.ropes[device])
        if device not in self.landings:
            self.landings[device] = Landing(*(torch.empty_like(each, device=device) for each in (given.streams, step.ids, live)))
        landing = self.landings[device]
        step.by_host(lambda: landing.take(given.streams, step.ids, live), device)
        return Joined(landing.streams), Step.at(landing.ids, step.start, self.ropes[device], landing.live, step.by_host)

    def _on(self, device: torch.device) -> AbstractContextManager[object]:
        """Kernels are launched on the current card, so it has to be the one whose layers they compute."""
        return torch.cuda.device(device) if len(self.ropes) > 1 and device.type == "cuda" else nullcontext()

    def _head(self, given: Joined, wanted: int) -> Tensor:
        """Logits [wanted, vocab] of the last tokens."""
        w, c = self.weights, self.config
        streams, sums = given.streams[-wanted:], None if given.sums is None else given.sums[-wanted:]
        merged = merge_streams(streams, w.hc_head, HyperSettings(c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters), sums)
        return linears(merged, [w.head], Norm(w.norm, c.rms_norm_eps))[0]

    def _check(self, ids: Tensor, state: State) -> None:
        state.demand_whole()
        if ids.dim() != 1 or len(ids) == 0 or ids.dtype != torch.int64:
            raise UsageError(f"Token ids must be a non-empty int64 list, not {ids.dtype} {list(ids.shape)}.",
                             "Give one row of ids.")
        size = self.config.vocab_size
        least, most = map(int, ids.aminmax())
        if least < 0 or most >= size:
            raise UsageError(f"Token id {least if least < 0 else most} is outside the vocabulary of {size}.",
                             f"Ids go from 0 to {size - 1}.")


class Landing(NamedTuple):
    """Where a decoded token arrives on another card."""

    streams: Tensor  # [1, hc_mult, hidden]
    ids: Tensor      # int64 [1]
    live: Tensor     # int64 [1]

    def take(self, *given: Tensor) -> None:
        for to, what in zip(self, given, strict=True):
            to.copy_(what, non_blocking=True)


def _queued(ids: Tensor) -> AbstractContextManager[None]:
    """All of a token's kernels on the CPU are on their way before the first ones are done. Prompts keep them busy enough."""
    return backends.queued() if len(ids) == 1 and ids.device.type == "cpu" else nullcontext()


def _nothing(device: torch.device) -> None:
    """Records nothing."""


def moved(given: Joined, device: torch.device) -> Joined:
    """Streams and sums on the card of the next layers, as soon as they are computed."""
    return Joined(given.streams.to(device), None if given.sums is None else given.sums.to(device))
