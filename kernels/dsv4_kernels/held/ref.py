"""Experts of which some are held, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.held import Held, Told
from dsv4_kernels.hyper.ref import spread_streams
from dsv4_kernels.moe import Expert
from dsv4_kernels.moe import ref as moe
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.router import Router, routed
from dsv4_kernels.router import ref as router_ref


def route_and_tell(x: Tensor, router: Router, ids: Tensor, told: Told) -> tuple[Tensor, Tensor]:
    weights, experts = routed(router_ref, x, router, ids)
    for to, what in zip(told, (x, weights, experts), strict=True):
        to.copy_(what)
    return weights, experts


def held_experts(x: Tensor, weights: Tensor, chosen: Tensor, shared: Expert, held: Held, limit: float) -> Tensor:
    return add_held(moe, x, weights, chosen, held, limit, moe.shared_expert(x, shared, limit))


def add_held(module: ModuleType, x: Tensor, weights: Tensor, chosen: Tensor, held: Held, limit: float, onto: Tensor) -> Tensor:
    """Adds the held ones to `onto` by a backend of `moe`, for whoever can look where they are."""
    places = held.places.to(chosen.device)[chosen]
    return _add_some(module, x, weights, places, places >= 0, held.there, limit, onto)


def other_experts(told: Told, experts: Sequence[Expert], held: Held, limit: float, part: Tensor) -> None:
    add_others(moe, told, experts, held, limit, part)


def add_others(module: ModuleType, told: Told, experts: Sequence[Expert], held: Held, limit: float, part: Tensor) -> None:
    """The same by a backend of `moe`."""
    _add_some(module, *told, held.places[told.experts] < 0, experts, limit, part.zero_())


def _add_some(module: ModuleType, x: Tensor, weights: Tensor, numbers: Tensor, some: Tensor, experts: Sequence[Expert],
              limit: float, onto: Tensor) -> Tensor:
    """Adds some [t, k] of each token's experts, by their numbers [t, k], to `onto`, token by token."""
    for row, these in enumerate(some):
        own = slice(row, row + 1)
        if these.any():
            mine = alloc.held(weights[own][:, these]), alloc.held(numbers[own][:, these])
            module.routed_experts(x[own], *mine, experts, limit, onto[own])
    return onto


def renew(held: Held) -> bool:
    """Nothing is kept of it."""
    return True


def join_part(out: Tensor, part: Tensor, residual: Residual) -> Joined:
    return Joined(spread_streams(out + part.to(out.device), *residual[:3]))
