"""The two ways to compute: `official`, with the roundings of the reference's caches, and `plain`, without.

Official rounds what its caches hold: K=V to FP8 but for the rotated part, which is bf16; the indexer's keys (and its
queries), after a Hadamard turn, to FP4. All of these are exact in bf16, so official caches take half the bytes of plain
ones and lose nothing. It also lets fast kernels round the activations that meet packed weights; plain does not. In both
the residual streams are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.rounding import round_index, round_kv
from dsv4cli.model.sizes import demand_numerics


@dataclass(frozen=True)
class Numerics:
    """Plain: values pass unchanged and caches are float32."""

    name: str = "plain"
    cache: torch.dtype = torch.float32
    exact: bool = True  # products take activations as they are, also where the weights are packed

    def kv(self, x: Tensor, rotated: int) -> Tensor:
        """What the cache keeps of K=V vectors [..., head_dim], whose last `rotated` values are rotated."""
        return x

    def index(self, x: Tensor) -> Tensor:
        """What the indexer keeps of keys and compares of queries [..., index_head_dim]."""
        return x


@dataclass(frozen=True)
class Official(Numerics):
    """The reference's roundings."""

    name: str = "official"
    cache: torch.dtype = torch.bfloat16
    exact: bool = False

    def kv(self, x: Tensor, rotated: int) -> Tensor:
        return round_kv(x, rotated)

    def index(self, x: Tensor) -> Tensor:
        return round_index(x)


NUMERICS = {each.name: each for each in (Numerics(), Official())}


def numerics_named(name: str) -> Numerics:
    """Raises UsageError for a name that is neither plain nor official."""
    demand_numerics(name)
    return NUMERICS[name]
