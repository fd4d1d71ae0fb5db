"""Experts of which some are held, in C++. A CPU has the host's share, whoever holds the others; only tests and benchmarks take a
part of its memory for a card's.

The card waits for the host's share, so what of it is Python's is short: where everything lies is found out once for a layer, and
of a token's choice a handful of numbers are copied without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, c_float, c_int64
from typing import Any, NamedTuple

from torch import Tensor, float32, int64

from dsv4_kernels.held import Held, Told
from dsv4_kernels.held.ref import add_held, add_others
from dsv4_kernels.hyper.cpu import spread_streams
from dsv4_kernels.moe import Expert
from dsv4_kernels.moe import cpu as moe
from dsv4_kernels.native.library import load
from dsv4_kernels.native.queue import by_torch, settle
from dsv4_kernels.residual import Joined, Residual
from dsv4_kernels.router import Router, cpu, routed

_SLOT = "_host_share"  # where a Held keeps its Share


class Share(NamedTuple):
    """What a call for one token's share needs, always the same memory."""

    given: tuple[Any, ...]  # told, experts and part, whose addresses these are
    weights: Array[c_float]
    numbers: Array[c_int64]
    mine: Array[c_float]
    others: Array[c_int64]
    bank: Any

    @classmethod
    def of(cls, told: Told, experts: Sequence[Expert], part: Tensor) -> Share | None:
        """None where the kernels do not compute that, or not all of it is one token's."""
        bank, k = moe.bank_of(experts), told.experts.shape[1]
        kinds = (told.x.dtype, told.weights.dtype, part.dtype, told.experts.dtype)
        if bank is None or len(told.x) != 1 or kinds != (float32, float32, float32, int64):
            return None
        if not all(each.is_contiguous() for each in (*told, part)):
            return None
        return cls((told, experts, part), (c_float * k).from_address(told.weights.data_ptr()),
                   (c_int64 * k).from_address(told.experts.data_ptr()), (c_float * k)(), (c_int64 * k)(), bank)


def route_and_tell(x: Tensor, router: Router, ids: Tensor, told: Told) -> tuple[Tensor, Tensor]:
    weights, experts = routed(cpu, x, router, ids)
    settle()
    for to, what in zip(told, (x, weights, experts), strict=True):
        to.copy_(what)
    return weights, experts


def held_experts(x: Tensor, weights: Tensor, chosen: Tensor, shared: Expert, held: Held, limit: float) -> Tensor:
    out = moe.shared_expert(x, shared, limit)
    settle()
    return add_held(moe, x, weights, chosen, held, limit, out)


def other_experts(told: Told, experts: Sequence[Expert], held: Held, limit: float, part: Tensor) -> None:
    settle()
    known = vars(held)
    share: Share | None = known.get(_SLOT)
    if share is None or share.given[0] is not told or share.given[1] is not experts or share.given[2] is not part:
        share = known[_SLOT] = Share.of(told, experts, part)
    if share is None:
        add_others(moe, told, experts, held, limit, part)
        settle()
        return
    part.zero_()
    count, here = 0, held.numbers
    for place, number in enumerate(share.numbers):
        if number not in here:
            share.mine[count], share.others[count], count = share.weights[place], number, count + 1
    if count:
        load().dsv4_add_experts(told.x.data_ptr(), 1, addressof(share.mine), addressof(share.others), count, share.bank,
                                len(experts), limit, False, part.data_ptr())
        settle()


def renew(held: Held) -> bool:
    """What is kept belongs to `there`, which is another one by now."""
    return True


def join_part(out: Tensor, part: Tensor, residual: Residual) -> Joined:
    return Joined(spread_streams(by_torch(out.add, part), *residual[:3]))
