"""Bytes that a model takes beside its stored weights, from its configuration alone (no torch)."""

from __future__ import annotations

import math

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4cli.errors import UsageError

CACHE_BYTES = {"plain": 4, "official": 2}  # of one cached value, by numerics
EXPAND_LIMIT = 512_000_000  # bytes of float32 weights; a model below it is decoded once, when it is bound
SCALED = 64, 32  # values under a byte of scale, of packed K=V and of packed index keys
OVERLAPPING = 4  # the ratio that has an indexer, and whose groups overlap


def demand_numerics(name: str) -> None:
    """Raises UsageError for a name that is neither plain nor official."""
    if name not in CACHE_BYTES:
        raise UsageError(f"There are no numerics called {name!r}.", f"Choose one of {', '.join(CACHE_BYTES)}.")


def state_bytes(config: ModelConfig, tokens: int, numerics: str, *, packed: bool = False) -> int:
    """Of a state with room for so many tokens: rings, entries, index keys, and the groups being filled (float32).

    packed: rows are what dsv4_kernels.cache.packed makes of them, which only official numerics leave room for. Raises
    UsageError for unknown numerics, and for plain ones that are to be packed.
    """
    return sum(layer_state_bytes(config, layer, tokens, numerics, packed=packed) for layer in range(config.num_hidden_layers))


def layer_state_bytes(config: ModelConfig, layer: int, tokens: int, numerics: str, *, packed: bool = False) -> int:
    """What one layer has of `state_bytes`."""
    demand_numerics(numerics)
    if packed and numerics != "official":
        raise UsageError(f"Caches of {numerics} numerics cannot be packed without loss.", "Use the official ones.")
    key, index = row_bytes(config, numerics, packed=packed)
    total, ratio = layer_pending_bytes(config, layer) + config.sliding_window * key, config.ratio(layer)
    if ratio:
        total += tokens // ratio * key
    if ratio == OVERLAPPING:
        total += tokens // ratio * index
    return total


def layer_pending_bytes(config: ModelConfig, layer: int) -> int:
    """Of one layer's state: the groups that its compressors are filling."""
    ratio = config.ratio(layer)
    index = _pending_bytes(ratio, config.index_head_dim) if ratio == OVERLAPPING else 0
    return index + (_pending_bytes(ratio, config.head_dim) if ratio else 0)


def row_bytes(config: ModelConfig, numerics: str, *, packed: bool = False) -> tuple[int, int]:
    """Bytes of a row of K=V (packed: FP8, scales, bf16 where it is rotated) and of an index key (packed: FP4, scales)."""
    if not packed:
        return config.head_dim * CACHE_BYTES[numerics], config.index_head_dim * CACHE_BYTES[numerics]
    still = config.head_dim - config.qk_rope_head_dim
    return (still + still // SCALED[0] + 2 * config.qk_rope_head_dim,
            config.index_head_dim // 2 + config.index_head_dim // SCALED[1])


def _pending_bytes(ratio: int, width: int) -> int:
    """Of a group being filled: keys and scores; where groups overlap also of the one before, and twice as wide."""
    doubled = 2 if ratio == OVERLAPPING else 1
    return 2 * (doubled * ratio) * (doubled * width) * 4


def expanded_bytes(config: ModelConfig, stored: int) -> int:
    """Of the float32 copies of a model that is small enough for them, 0 for others; `stored` bytes lie in its files."""
    if stored > 2 * EXPAND_LIMIT:  # no stored type is wider than twice float32
        return 0
    wanted = 4 * sum(math.prod(spec.shape) for spec in schema.gguf_tensors(config))
    return wanted if wanted <= EXPAND_LIMIT else 0
