"""Group pooling in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.compressor import Pending


def compress(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending, position: int,
             at: Tensor | None = None) -> Tensor:
    ratio = len(ape)
    before = len(pending.kv) - ratio  # rows of the previous group: ratio with overlap, else none
    filled = position % ratio
    places = torch.arange(position, position + len(kv), device=kv.device) % ratio
    scores = scores + ape[places]
    groups = (filled + len(kv)) // ratio
    if not groups:
        fresh = slice(before + filled, before + filled + len(kv))
        pending.kv[fresh], pending.scores[fresh] = kv, scores
        return kv.new_zeros(0, kv.shape[1] // (2 if before else 1))

    kv = torch.cat([pending.kv[:before + filled], kv])
    scores = torch.cat([pending.scores[:before + filled], scores])
    pooled = (_candidates(scores, groups, ratio, before).softmax(1) * _candidates(kv, groups, ratio, before)).sum(1)
    left = slice(groups * ratio, None)
    pending.kv[:len(kv[left])], pending.scores[:len(kv[left])] = kv[left], scores[left]
    return pooled


def _candidates(rows: Tensor, groups: int, ratio: int, before: int) -> Tensor:
    """rows [before + groups * ratio + rest, c * d] -> [groups, c * ratio, d]: what each group pools."""
    own = rows[before:before + groups * ratio].unflatten(0, (groups, ratio))
    if not before:
        return own
    width = rows.shape[1] // 2
    previous = rows[:groups * ratio].unflatten(0, (groups, ratio))
    return torch.cat([previous[..., :width], own[..., width:]], 1)
