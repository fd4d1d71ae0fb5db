"""Compression: every full group of tokens becomes one entry that attention can see (spec/checkpoint.md section 3.8)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape

OVERLAPPING = 4  # the ratio whose entries also look back at the group before


class Pending(NamedTuple):
    """Tokens whose group is not full yet, and for an overlapping compressor the last full group before them.

    Both [slots, c * d], where c is 2 and slots 2 * ratio with overlap, else 1 and ratio. With overlap slots [0, ratio)
    are the previous group (absent at first: score -inf), the others the group being filled. Scores include ape.
    """

    kv: Tensor
    scores: Tensor

    @staticmethod
    def shape(ratio: int, width: int) -> tuple[int, int]:
        """Of each of the two tensors, for entries of `width` values."""
        c = 2 if ratio == OVERLAPPING else 1
        return c * ratio, c * width

    @classmethod
    def fresh(cls, ratio: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Pending:
        """Before the first token."""
        shape = cls.shape(ratio, width)
        return cls(alloc.full(shape, 0.0, dtype, device), alloc.full(shape, float("-inf"), dtype, device))


def compress(kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending, position: int, at: Tensor | None = None, *,
             backend: str | None = None) -> Tensor:
    """Entries of the groups that these tokens complete; `pending` is brought up to date in place.

    kv, scores [t, c * d]: the projections of tokens position .. position + t; ape [ratio, c * d] is added to a token's
    scores by its place in the group. -> [groups, d], before norm and rotation; row i is the entry of group
    position // ratio + i. A group is pooled per channel with the softmax of its scores; with overlap, eight candidates:
    the previous group's first d channels and this group's last d. at: int64 [1], the position in the device's memory, from
    where a recorded launch reads it each time; whether a group is completed is the host's to know and stays as it was recorded.
    """
    demand_tokens(kv.shape[0] if at is None else 1, kv, scores, ape, pending)
    return pick("compressor", kv.device.type, backend).module.compress(kv, scores, ape, pending, position, at)


def demand_tokens(t: int, kv: Tensor, scores: Tensor, ape: Tensor, pending: Pending) -> int:
    """Values of an entry of t tokens. Raises ValueError unless all shapes are those that `compress` names."""
    ratio = ape.shape[0]
    d = ape.shape[1] // (2 if ratio == OVERLAPPING else 1)
    slots, width = Pending.shape(ratio, d)
    demand_shape("ape", ape, ratio, width)
    demand_shape("kv", kv, t, width)
    demand_shape("scores", scores, t, width)
    demand_shape("pending kv", pending.kv, slots, width)
    demand_shape("pending scores", pending.scores, slots, width)
    return d
