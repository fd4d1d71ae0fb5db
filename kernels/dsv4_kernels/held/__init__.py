"""A layer's experts, of which a card holds some and the host has the others: one token's way through both.

The card chooses, and tells the host (`route_and_tell`); without waiting it computes what it holds (`held_experts`), while the
host computes the rest (`other_experts`); then all of it joins the streams (`join_part`). What a card launches is the same for
every choice, so it can be recorded and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape
from dsv4_kernels.moe import Expert, Experts, shared_expert
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.router import Router


class Told(NamedTuple):
    """Memory that the host reads and the device writes: of t tokens all that whoever computes their experts has to know."""

    x: Tensor        # [t, d]
    weights: Tensor  # [t, k]
    experts: Tensor  # int64 [t, k]


class Held:
    """Those of a layer's experts that lie where it is computed. Which ones may change; then `hold` changes what kernels read, in
    the memory where they read it, so that a recorded run stays right."""

    def __init__(self, count: int, like: Expert | None, device: torch.device) -> None:
        """count: of all experts of the layer. like: views of memory that stays there as long as this, from where the held ones'
        places are counted, whatever it contains; None where nothing will be held."""
        self.like, self.device = like, device
        self.places = torch.full((count,), -1)  # of each expert, its place in `there`; on the host
        self.numbers: frozenset[int] = frozenset()
        self.there = Experts()

    def hold(self, copies: Mapping[int, Expert]) -> bool:
        """From now on these are held, by number, and no others. Whatever was launched before reads what was there before. Returns
        whether recorded runs stay right: not if the kernels cannot compute what is held."""
        numbers, self.numbers = sorted(copies), frozenset(copies)
        self.places.fill_(-1)
        self.places[torch.tensor(numbers, dtype=torch.int64)] = torch.arange(len(numbers))
        self.there = Experts(copies[number] for number in numbers)
        return self.like is None or pick("held", self.device.type).module.renew(self)


def route_and_tell(x: Tensor, router: Router, ids: Tensor, told: Told, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """As `route`, weights [t, k] and experts int64 [t, k]; they and x are copied to `told`. x [t, d], ids int64 [t]."""
    demand_shape("x", x, None, router.gate.shape[1])
    demand_shape("ids", ids, x.shape[0])
    demand_shape("told x", told.x, *x.shape)
    for part in told[1:]:
        demand_shape("told choice", part, x.shape[0], router.k)
    return pick("held", x.device.type, backend).module.route_and_tell(x, router, ids, told)


def held_experts(x: Tensor, weights: Tensor, chosen: Tensor, shared: Expert, held: Held, limit: float, *,
                 backend: str | None = None) -> Tensor:
    """shared_expert(x), plus the weighted sum of those of the chosen experts that are held; the others are left out.

    x [t, d], weights [t, k], chosen int64 [t, k], numbers of experts -> [t, d]. The shared expert's part comes first or last,
    the others' in any fixed order.
    """
    demand_shape("expert weights", weights, x.shape[0], None)
    demand_shape("chosen experts", chosen, *weights.shape)
    _demand_fit("shared w1", shared, x)
    if held.like is None:
        return shared_expert(x, shared, limit, backend=backend)
    _demand_fit("held w1", held.like, x)
    return pick("held", x.device.type, backend).module.held_experts(x, weights, chosen, shared, held, limit)


def other_experts(told: Told, experts: Sequence[Expert], held: Held, limit: float, part: Tensor, *,
                  backend: str | None = None) -> None:
    """The host's share: writes to part [t, d] the weighted sum of those of the chosen experts that are not held, and 0 where
    there are none. experts: all of the layer, where the host has them. Computed when it returns."""
    demand_shape("part", part, *told.x.shape)
    _demand_fit("experts w1", experts[0], told.x)
    pick("held", part.device.type, backend).module.other_experts(told, experts, held, limit, part)


def join_part(out: Tensor, part: Tensor, residual: Residual, *, backend: str | None = None) -> Joined:
    """spread_streams(out + part, ...). out and part [t, d]; part may lie in memory of the host that the device reads."""
    streams, post, across, fn = residual
    t, s, d = streams.shape
    demand_shape("out", out, t, d)
    demand_shape("part", part, t, d)
    demand_shape("post", post, t, s)
    demand_shape("across", across, t, s, s)
    demand_shape("hyper fn", fn, None, s * d)
    return pick("held", out.device.type, backend).module.join_part(out, part, residual)


def _demand_fit(name: str, expert: Expert, x: Tensor) -> None:
    demand_shape(name, expert.w1, None, x.shape[1])
