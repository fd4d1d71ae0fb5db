"""The launches of a decoded token, recorded once for each kind of token and replayed for all others of that kind.

On a card a token is hundreds of small launches, and describing them takes the host longer than computing them takes the card.
Of what changes from token to token, its id and its position, kernels read both from memory (Step.live), so a recorded run is
right for any token that completes the same groups and chooses or does not: a few kinds. The first token of a kind is computed
as it is described, which also compiles its kernels; the second one is recorded. A recording belongs to one state, whose memory
it knows by its addresses, and is dropped when that moves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

Compute = Callable[[Tensor, Tensor], Tensor]  # (ids int64 [1], position int64 [1]) -> logits, all in the device's memory


class Recorded(Protocol):
    """A run that can be repeated."""

    def replay(self) -> Tensor:
        """Computes it again on what now lies in its inputs; the result lies where it lay before."""
        ...


class CudaGraph:
    """A run as a CUDA graph (HIP's on AMD's cards)."""

    def __init__(self, compute: Callable[[], Tensor], pool: Any) -> None:
        """Nothing is computed yet. pool: torch's name for the memory of graphs of which one is replayed at a time. Raises
        RuntimeError where something waits for the card, or otherwise cannot be recorded."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._out = compute()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._out


Record = Callable[[Callable[[], Tensor]], Recorded]


def recorder(device: torch.device) -> Record | None:
    """What records runs on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda compute: CudaGraph(compute, pool)


class Recording:
    """All recorded runs of one state, and the memory from which they read a token's id and position."""

    def __init__(self, device: torch.device, record: Record | None) -> None:
        self.trouble: str | None = None  # why nothing is recorded
        self._record = record
        self._ids, self._position = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._met: set[Hashable] = set()
        self._runs: dict[Hashable, Recorded] = {}
        if record is None:
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
        return compute(self._ids, self._position)

    def _recorded(self, kind: Hashable, compute: Compute) -> bool:
        """Records a run, without computing it; where that fails, says why and never tries again."""
        assert self._record is not None, "there is trouble where nothing records"
        try:
            self._runs[kind] = self._record(lambda: compute(self._ids, self._position))
        except RuntimeError as failure:
            self.trouble = str(failure).partition("\n")[0]
        return self.trouble is None
