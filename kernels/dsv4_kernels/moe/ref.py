"""Experts in plain torch: tokens are grouped by expert, so that each chosen expert is decoded once a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional

from dsv4_kernels import alloc
from dsv4_kernels.linear.ref import linear
from dsv4_kernels.moe import Expert


def routed_experts(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert], limit: float,
                   onto: Tensor | None = None) -> Tensor:
    out = alloc.full(tuple(x.shape), 0.0, x.dtype, x.device) if onto is None else onto
    for number, tokens, slots in by_expert(chosen):
        hidden = _swiglu(x[tokens], experts[number], limit) * weights[tokens, slots, None]
        out.index_add_(0, tokens, linear(hidden, experts[number].w2))
    return out


def shared_expert(x: Tensor, expert: Expert, limit: float) -> Tensor:
    return linear(_swiglu(x, expert, limit), expert.w2)


def ask_for(experts: Sequence[Expert], numbers: Sequence[int]) -> None:
    """Nobody asks: the system reads what is touched."""


def by_expert(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) for each expert that chosen [t, k] names, in ascending order."""
    order = chosen.flatten().argsort(stable=True)
    numbers, counts = chosen.flatten()[order].unique_consecutive(return_counts=True)
    for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        yield number, places // chosen.shape[1], places % chosen.shape[1]


def _swiglu(x: Tensor, expert: Expert, limit: float) -> Tensor:
    gate = linear(x, expert.w1).clamp(max=limit)
    up = linear(x, expert.w3).clamp(-limit, limit)
    return functional.silu(gate) * up
