"""Sampling in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_kernels.sampling import BANNED, SEEN, UNIT, Filters

NONE = -1


def sample(logits: Tensor, marks: Tensor, filters: Filters, draw: int) -> Tensor:
    scores = penalised(logits, marks, filters.penalty)
    best = scores.max()
    if bool(logits.isnan().any()) or not bool(best.isfinite()):
        return torch.full((1,), NONE, device=logits.device)
    if filters.temperature == 0:
        return scores.argmax().reshape(1)
    behind = chances(scores, filters).cumsum(0)
    total = int(behind[-1])
    aim = min(int(draw * 2.0**-53 * total), total - 1)
    return (behind > aim).to(torch.uint8).argmax().reshape(1)


def penalised(logits: Tensor, marks: Tensor, penalty: float) -> Tensor:
    """Scores float32 [vocab]: -inf where a token is banned."""
    scores = logits.float()
    if penalty != 1:
        by = torch.tensor(penalty, dtype=torch.float32, device=logits.device)
        scores = torch.where(marks & SEEN != 0, torch.where(scores > 0, scores / by, scores * by), scores)
    return scores.masked_fill(marks & BANNED != 0, -torch.inf)


def chances(scores: Tensor, filters: Filters) -> Tensor:
    """int64 [vocab]: 2^UNIT for the likeliest, 0 for what is not kept. Some score must be finite, and none NaN."""
    temperature, top_p, min_p = torch.tensor([filters.temperature, filters.top_p, filters.min_p]).double().tolist()
    wide = scores.double()
    weights = (((wide - wide.max()) / temperature).exp() * 2.0**UNIT + 0.5).floor().to(torch.int64)
    kept = torch.ones_like(weights, dtype=torch.bool)
    if 0 < filters.top_k < len(scores):
        kept = _greatest(scores, filters.top_k)
    if top_p < 1:
        index = scores.masked_fill(~kept, -torch.inf).argsort(descending=True, stable=True)
        mass = weights[index].where(kept[index], 0)
        needed = max(1, math.ceil(top_p * int(mass.sum())))
        kept = torch.zeros_like(kept).scatter_(0, index, (mass.cumsum(0) - mass < needed) & kept[index])
    return weights.where(kept & (weights.double() >= min_p * 2.0**UNIT), 0)


def _greatest(scores: Tensor, count: int) -> Tensor:
    """Which are the `count` greatest, of equal ones the first."""
    last = scores.topk(count).values[-1]
    equal, above = scores == last, scores > last
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))
