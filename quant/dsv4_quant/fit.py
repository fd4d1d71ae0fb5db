"""Types for the routed experts, layer by layer, so that a file gets no larger than wanted.

Every matrix begins with the smallest type and is raised step by step, each time the step that saves most error for its
bytes. The error of a type is what it does to the squares of weights, times their number, times how much the place matters.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from dsv4_quant.files.gguf_writer import row_bytes
from dsv4_quant.recipe import Rule, fitting

# Squared error of normally distributed weights, relative to their squares, measured with importance 0.1 .. 1.1.
ERRORS = {
    "q8_0": 2.9e-5, "q6_k": 2.7e-4, "q5_k": 1.14e-3, "q4_k": 4.65e-3, "iq4_xs": 5.3e-3, "mxfp4": 1.24e-2, "q3_k": 1.97e-2,
    "iq3_xxs": 2.8e-2, "q2_k": 6.2e-2, "iq2_xs": 7.2e-2, "iq2_xxs": 9.5e-2, "iq1_m": 0.163,
}  # fmt: skip
DOWN_MATTERS = 1.5  # its output is added to the stream as it is; an error of gate or up passes a product first
ENDS_MATTER = 2.0  # the first and the last eighth of the layers


class Group(NamedTuple):
    """The routed matrices of a layer that share a type: gate and up, or down."""

    slot: str
    layer: int
    columns: int
    rows: int
    exact: str | None  # the type that holds the stored weights without any error


class Step(NamedTuple):
    """From one type to the next: what a byte of it saves, negative so that the best sorts first."""

    gain: float
    group: int
    kind: str
    nbytes: int  # more than before


def smallest(groups: Sequence[Group]) -> int:
    """Bytes of the groups with the smallest type each."""
    return sum(_ladder(group, len(groups))[0][1] for group in groups)


def fit(groups: Sequence[Group], budget: int) -> list[Rule]:
    """A rule for each group; together they take at most `budget` bytes, which must not be less than `smallest`."""
    ladders = [_ladder(group, len(groups)) for group in groups]
    chosen = [ladder[0][0] for ladder in ladders]
    left = budget - sum(ladder[0][1] for ladder in ladders)
    steps: list[list[Step]] = [_steps(index, ladder) for index, ladder in enumerate(ladders)]
    ready = [queue.pop(0) for queue in steps if queue]
    heapq.heapify(ready)
    while ready:
        step = heapq.heappop(ready)
        if step.nbytes > left:
            continue  # this group stays; a cheaper step of another may still fit
        chosen[step.group], left = step.kind, left - step.nbytes
        if steps[step.group]:
            heapq.heappush(ready, steps[step.group].pop(0))
    return [Rule(group.slot, kind, group.layer, group.layer) for group, kind in zip(groups, chosen, strict=True)]


def _ladder(group: Group, groups: int) -> list[tuple[str, int, float]]:
    """(type, bytes, error) from the smallest, only those that save more error for their bytes than those behind them."""
    layers = groups // 2
    matters = DOWN_MATTERS if group.slot == "down" else 1.0
    if min(group.layer, layers - 1 - group.layer) < layers // 8:
        matters *= ENDS_MATTER
    weights = group.rows * group.columns
    rungs = []
    for kind in fitting(group.columns):
        if kind in ERRORS:
            error = 0.0 if kind == group.exact else ERRORS[kind] * weights * matters
            rungs.append((kind, group.rows * row_bytes(kind, group.columns), error))
    hull: list[tuple[str, int, float]] = []
    for rung in sorted(rungs, key=lambda rung: (rung[1], rung[2])):
        if hull and rung[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _gain(hull[-2], rung) <= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(rung)
    return hull


def _gain(low: tuple[str, int, float], high: tuple[str, int, float]) -> float:
    """Error saved per byte, negative."""
    return (high[2] - low[2]) / (high[1] - low[1])


def _steps(index: int, ladder: list[tuple[str, int, float]]) -> list[Step]:
    return [Step(_gain(low, high), index, high[0], high[1] - low[1]) for low, high in pairwise(ladder)]
