"""Index scores and their top k in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.cache.packed import unpack_index
from dsv4_kernels.tiles import tiles


def top_indices(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int) -> Tensor:
    t, heads, _ = q.shape
    n, q = len(keys), q.to(weights.dtype)
    keys = (unpack_index(keys) if keys.dtype == torch.uint8 else keys).to(q.dtype)
    numbers = torch.arange(n, device=q.device)
    chosen = alloc.empty((t, min(k, n)), torch.int64, q.device)
    for rows in tiles(t, heads * n):
        scores = index_scores(q[rows], weights[rows], keys)
        scores.masked_fill_(numbers >= visible[rows, None], float("-inf"))
        best, where = scores.topk(min(k, n), sorted=False)
        chosen[rows] = where.masked_fill_(best == float("-inf"), -1)
    return chosen


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """q [t, heads, d], weights [t, heads], keys [n, d] -> [t, n], blind to what is visible."""
    products = (q.flatten(0, 1) @ keys.T).relu_().unflatten(0, (len(q), -1))  # [t, heads, n]
    return torch.bmm(weights.unsqueeze(1), products).squeeze(1)
