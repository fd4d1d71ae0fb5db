"""The launches of a decoded token, recorded once for each kind of token and replayed for all others of that kind.

On a card a token is hundreds of small launches, and describing them takes the host longer than computing them takes the card. On
the CPU it is as many calls of kernels, and a thread that describes them does not compute meanwhile. Of what changes from token
to token, its id and its position, kernels read both from memory (Step.live), so a recorded run is right for any token that
completes the same groups and chooses or does not: a few kinds. The first token of a kind is computed as it is described, which
also compiles its kernels; the second one is recorded. A recording belongs to one state, whose memory it knows by its addresses,
and is dropped when that moves.

Where the host has to act in the middle of a token, the run consists of pieces, between which it does so each time. A piece
belongs to one card.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dsv4_kernels import backends

Act = Callable[[], None]


class ByHost(Protocol):
    """Who sees to it that the host does something in the middle of a run."""

    def __call__(self, act: Act, device: torch.device | None = None) -> None:
        """act: behind what has been launched so far, and before what will be. device: who computes from then on, if another one.
        What `act` needs of earlier launches and leaves for later ones lies in memory that stays where it is."""
        ...


def at_once(act: Act, device: torch.device | None = None) -> None:
    """Where nothing is recorded."""
    act()


Compute = Callable[[Tensor, Tensor, ByHost], Tensor]  # (ids int64 [1], position int64 [1], ...) -> logits, on the device


class Piece(Protocol):
    """Launches that can be repeated."""

    def begin(self) -> None:
        """What this thread launches from now on is written down and not computed."""
        ...

    def end(self) -> None:
        """Raises RuntimeError where something waited for the card, or otherwise cannot be recorded."""
        ...

    def abandon(self) -> None:
        """Ends it in whatever condition it is."""
        ...

    def replay(self) -> None:
        """Computes it on what now lies in its inputs; results lie where they lay when it was recorded."""
        ...


class CudaGraph:
    """A piece as a CUDA graph (HIP's on AMD's cards)."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """pool: torch's name for the memory of graphs that are replayed in the order in which they were recorded. stream: on
        which all of them are."""
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream
        self._within = ExitStack()

    def begin(self) -> None:
        torch.cuda.synchronize(self._stream.device)
        self._within.enter_context(torch.cuda.stream(self._stream))
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with self._within:
            self._graph.capture_end()

    def abandon(self) -> None:
        with suppress(RuntimeError):
            self.end()

    def replay(self) -> None:
        self._graph.replay()


Record = Callable[[], Piece]


def recorder(device: torch.device) -> Record | None:
    """What makes pieces for this device: graphs, or tapes of the CPU's kernels; None where nothing is recorded."""
    if backends.on_tape(device.type):
        return backends.tapes()
    if device.type != "cuda":
        return None
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    return lambda: CudaGraph(pool, stream)


def alone(record: Record, launch: Callable[[], object]) -> Piece:
    """What `launch` launches as a piece of its own, not computed yet. Raises RuntimeError where that cannot be recorded."""
    piece = record()
    try:
        piece.begin()
        launch()
        piece.end()
    except BaseException:
        piece.abandon()
        raise
    return piece


class Run(NamedTuple):
    """Pieces of a token, what the host does behind each but the last, and where the result lies."""

    pieces: Sequence[Piece]
    acts: Sequence[Act]
    out: Tensor

    def replay(self) -> Tensor:
        for piece, act in zip(self.pieces, self.acts, strict=False):
            piece.replay()
            act()
        self.pieces[-1].replay()
        return self.out


class Recording:
    """All recorded runs of one state, and the memory from which they read a token's id and position."""

    def __init__(self, device: torch.device, records: Callable[[torch.device], Record | None], layout: int = 0) -> None:
        """device: where a token begins. records: a `recorder`. layout: of what else the runs know by its address."""
        self.trouble: str | None = None  # why nothing is recorded
        self.layout = layout
        self._device, self._records, self._of = device, records, dict[torch.device, Record | None]()
        self._ids, self._position = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._met: set[Hashable] = set()
        self._runs: dict[Hashable, Run] = {}
        if self._record(device) is None:
            self.trouble = "nothing records launches here"

    def run(self, kind: Hashable, ids: Tensor, position: int, compute: Compute) -> Tensor:
        """What `compute` makes of a token ids int64 [1] at `position`, valid until the next run. Tokens of one `kind` differ in
        these two alone, and lead to the same launches."""
        self._ids.copy_(ids)
        self._position.fill_(position)
        if kind in self._runs:
            return self._runs[kind].replay()
        if kind in self._met and self.trouble is None and self._recorded(kind, compute):
            return self._runs[kind].replay()
        self._met.add(kind)
        return compute(self._ids, self._position, at_once)

    def _recorded(self, kind: Hashable, compute: Compute) -> bool:
        """Records a run, without computing it or doing the host's part; where that fails, says why and never tries again."""
        here, pieces, acts = self._device, list[Piece](), list[Act]()

        def begun() -> None:
            pieces.append(self._demanded(here))
            pieces[-1].begin()

        def by_host(act: Act, device: torch.device | None = None) -> None:
            nonlocal here
            pieces[-1].end()
            acts.append(act)
            here = here if device is None else device
            begun()

        try:
            begun()
            out = compute(self._ids, self._position, by_host)
            pieces[-1].end()
            self._runs[kind] = Run(pieces, acts, out)
        except BaseException as failure:
            for piece in pieces[-1:]:
                piece.abandon()
            if not isinstance(failure, RuntimeError):
                raise
            self.trouble = str(failure).partition("\n")[0]
        return self.trouble is None

    def _record(self, device: torch.device) -> Record | None:
        if device not in self._of:
            self._of[device] = self._records(device)
        return self._of[device]

    def _demanded(self, device: torch.device) -> Piece:
        record = self._record(device)
        assert record is not None, "there is trouble where nothing records"
        return record()
