"""Which columns of each matrix are used, and how much: squares of all activations that meet it, summed as they pass.

The collector watches the doors of the kernels (`backends.watched`), so the model that is measured is the model that runs.
What meets an expert's way down exists only inside the experts' kernel and is computed here once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_kernels.linear import linear
from dsv4_kernels.moe import Expert
from dsv4_kernels.norm_rope import rms_norm
from dsv4_kernels.router import route
from dsv4_quant.imatrix import Entry
from dsv4_quant.schema import GGUF_EXPERTS, gguf_name
from dsv4cli.model.transformer import Model
from dsv4cli.model.weights import matrices

# The indexer's queries are computed only where there is something to choose from, thousands of tokens into a text; but what
# would meet these matrices meets others in every token.
SAME_INPUT = {"indexer.attn_q_b.weight": "attn_q_b.weight", "indexer.proj.weight": "attn_q_a.weight"}


@dataclass
class Meter:
    """sums float32 [matrices, columns], counts int64 [matrices]: what came to the matrices of one tensor."""

    sums: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, count: int, columns: int) -> Meter:
        return cls(torch.zeros(count, columns), torch.zeros(count, dtype=torch.int64))

    def add(self, number: int, x: Tensor) -> None:
        """x [..., columns] met matrix `number`."""
        rows = x.reshape(-1, x.shape[-1])
        self.sums[number] += rows.double().square().sum(0).float().cpu()
        self.counts[number] += len(rows)


class Collector:
    """A watcher of the doors. Holds float32 sums for every matrix; gate and up of an expert meet the same."""

    def __init__(self, model: Model) -> None:
        self.model = model  # what is known by its identity has to live
        self.meters: dict[str, Meter] = {}
        self._names: dict[int, str] = {}
        self._layers: dict[int, int] = {}
        for official, weight in matrices(model.weights):
            name, expert = gguf_name(official)
            if expert is None and not name.endswith(tuple(SAME_INPUT)):
                self._names[id(weight)] = name
                self.meters[name] = Meter.empty(1, weight.shape[1])
        for number, layer in enumerate(model.weights.layers):
            self._add_experts(number, layer.moe.experts)
            if layer.attention.indexer is not None:
                self.meters |= {f"blk.{number}.{own}": self.meters[f"blk.{number}.{other}"] for own, other in SAME_INPUT.items()}

    def _add_experts(self, layer: int, experts: list[Expert]) -> None:
        self._layers[id(experts)] = layer
        inward = Meter.empty(len(experts), experts[0].w1.shape[1])
        for matrix, meter in (("w1", inward), ("w3", inward), ("w2", Meter.empty(len(experts), experts[0].w2.shape[1]))):
            self.meters[_stack(layer, matrix)] = meter

    def __call__(self, door: str, given: tuple[Any, ...]) -> None:
        if door in ("linear", "grouped_linear", "route_learned", "route_by_hash", "project_into_streams"):
            x, weight = given[:2]
            self._met(self._names.get(id(weight)), x)
        elif door == "linears":
            x, weights, norm = given
            x = x if norm is None else rms_norm(x, *norm)
            for weight in weights:
                self._met(self._names.get(id(weight)), x)
        elif door == "shared_expert":
            self._shared_expert(*given)
        elif door == "routed_experts":
            self._routed(*given[:5])
        elif door == "experts_into_streams":
            x, ids, router, shared, experts, limit = given[:6]
            self._shared_expert(x, shared, limit)
            self._routed(x, *route(x, router, ids), experts, limit)  # by the router's doors, which are watched too

    def _met(self, name: str | None, x: Tensor) -> None:
        if name is not None:
            self.meters[name].add(0, x)

    def _shared_expert(self, x: Tensor, expert: Expert, limit: float) -> None:
        # Computing what goes down passes the doors, where the way in is counted.
        self._met(self._names.get(id(expert.w2)), _hidden(x, expert, limit))

    def _routed(self, x: Tensor, shares: Tensor, chosen: Tensor, experts: list[Expert], limit: float) -> None:
        layer = self._layers.get(id(experts))
        if layer is None:
            return
        inward, down = self.meters[_stack(layer, "w1")], self.meters[_stack(layer, "w2")]
        for number in chosen.unique().tolist():
            tokens, slots = (chosen == number).nonzero(as_tuple=True)
            inward.add(number, x[tokens])
            down.add(number, _hidden(x[tokens], experts[number], limit) * shares[tokens, slots, None])

    def entries(self) -> dict[str, Entry]:
        """What was collected so far, by GGUF tensor."""
        return {name: Entry(meter.sums, meter.counts.float()) for name, meter in self.meters.items()}

    def restore(self, entries: dict[str, Entry]) -> None:
        """Goes on from what `entries` once returned."""
        for name, entry in entries.items():
            self.meters[name].sums.copy_(entry.sums)
            self.meters[name].counts.copy_(entry.counts.round().to(torch.int64))

    def unvisited(self) -> Iterator[tuple[int, int]]:
        """(layer, expert) of every routed expert that no token came to."""
        for layer in sorted(self._layers.values()):
            counts = self.meters[_stack(layer, "w1")].counts
            yield from ((layer, expert) for expert in (counts == 0).nonzero()[:, 0].tolist())


def _stack(layer: int, matrix: str) -> str:
    return f"blk.{layer}.{GGUF_EXPERTS[matrix]}"


def _hidden(x: Tensor, expert: Expert, limit: float) -> Tensor:
    """What meets the way down, before an expert's share: [t, width]."""
    up = linear(x, expert.w3).clamp(-limit, limit)
    return functional.silu(linear(x, expert.w1).clamp(max=limit)) * up
