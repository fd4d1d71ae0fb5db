"""The lightning indexer: which compressed entries a token may look at (spec/checkpoint.md section 3.9)."""

from __future__ import annotations

from torch import Tensor, uint8

from dsv4_kernels.backends import pick
from dsv4_kernels.cache.packed import index_bytes
from dsv4_kernels.checks import demand_shape


def top_indices(q: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, k: int, *,
                backend: str | None = None) -> Tensor:
    """The k best entries of each token by score_n = sum_h weights_h * relu(q_h . key_n).

    q [t, heads, d] in the type of the weights or as bfloat16, weights [t, heads] (with the factor (d * heads)^-0.5), keys [n, d]
    in any float type or packed (cache.packed), uint8 [n, index_bytes], visible [t]: how many entries, counted from the first,
    each token may see. -> int64 [t, min(k, n)] in no particular order; -1
    where a token sees fewer. Scores are made in tiles of tokens. Ties may go either way.
    """
    t, heads, d = q.shape
    demand_shape("index weights", weights, t, heads)
    demand_shape("index keys", keys, None, index_bytes(d) if keys.dtype == uint8 else d)
    demand_shape("visible", visible, t)
    if k < 1:
        raise ValueError(f"k is {k}, but at least one entry must be chosen")
    return pick("indexer", q.device.type, backend).module.top_indices(q, weights, keys, visible, k)
