"""What lies between projections and attention in plain torch: one step after the other, as each operation has it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsv4_kernels.cache import ref as cache
from dsv4_kernels.compressor import ref as compressor
from dsv4_kernels.norm_rope import ref as norm_rope
from dsv4_kernels.prologue import Compression, Keeping, Queries, Steps, one_by_one
from dsv4_kernels.rounding import ref as rounding

_STEPS = Steps(cache, compressor, norm_rope, rounding)


def attention_prologue(kv: Tensor, keys: Keeping, compressions: Sequence[Compression], queries: Queries | None, eps: float,
                       position: int, at: Tensor | None = None) -> Tensor | None:
    return one_by_one(_STEPS, kv, keys, compressions, queries, eps, position, at)
