"""The two ways to compute: `official`, with the roundings of the reference's caches, and `plain`, without.

Official rounds what its caches hold: K=V to FP8 but for the rotated part, which is bf16; the indexer's keys (and its
queries), after a Hadamard turn, to FP4. All of these are exact in bf16, so official caches take half the bytes of plain
ones and lose nothing. It also lets fast kernels round the activations that meet packed weights; plain does not. In both
the residual streams are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv4_kernels.cache import Rounding
from dsv4cli.model.sizes import demand_numerics


@dataclass(frozen=True)
class Numerics:
    """Plain: values pass unchanged and caches are float32."""

    name: str = "plain"
    cache: torch.dtype = torch.float32
    exact: bool = True  # products take activations as they are, also where the weights are packed
    kv: Rounding = "none"  # of K=V vectors on their way into the cache
    index: Rounding = "none"  # of index keys, and of the queries that meet them


@dataclass(frozen=True)
class Official(Numerics):
    """The reference's roundings."""

    name: str = "official"
    cache: torch.dtype = torch.bfloat16
    exact: bool = False
    kv: Rounding = "kv"
    index: Rounding = "index"


NUMERICS = {each.name: each for each in (Numerics(), Official())}


def numerics_named(name: str) -> Numerics:
    """Raises UsageError for a name that is neither plain nor official."""
    demand_numerics(name)
    return NUMERICS[name]
