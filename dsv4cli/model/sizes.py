"""Bytes that a model takes beside its stored weights, from its configuration alone (no torch)."""

from __future__ import annotations

import math

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4cli.errors import UsageError

CACHE_BYTES = {"plain": 4, "official": 2}  # of one cached value, by numerics
EXPAND_LIMIT = 512_000_000  # bytes of float32 weights; a model below it is decoded once, when it is bound
OVERLAPPING = 4  # the ratio that has an indexer, and whose groups overlap


def demand_numerics(name: str) -> None:
    """Raises UsageError for a name that is neither plain nor official."""
    if name not in CACHE_BYTES:
        raise UsageError(f"There are no numerics called {name!r}.", f"Choose one of {', '.join(CACHE_BYTES)}.")


def state_bytes(config: ModelConfig, tokens: int, numerics: str) -> int:
    """Of a state with room for so many tokens: rings, entries, index keys, and the groups being filled (float32).

    Raises UsageError for unknown numerics.
    """
    demand_numerics(numerics)
    value = CACHE_BYTES[numerics]
    total = config.num_hidden_layers * config.sliding_window * config.head_dim * value
    for ratio in filter(None, map(config.ratio, range(config.num_hidden_layers))):
        total += _compressor_bytes(ratio, config.head_dim, tokens, value)
        if ratio == OVERLAPPING:
            total += _compressor_bytes(ratio, config.index_head_dim, tokens, value)
    return total


def _compressor_bytes(ratio: int, width: int, tokens: int, value: int) -> int:
    doubled = 2 if ratio == OVERLAPPING else 1
    return 2 * (doubled * ratio) * (doubled * width) * 4 + tokens // ratio * width * value


def expanded_bytes(config: ModelConfig, stored: int) -> int:
    """Of the float32 copies of a model that is small enough for them, 0 for others; `stored` bytes lie in its files."""
    if stored > 2 * EXPAND_LIMIT:  # no stored type is wider than twice float32
        return 0
    wanted = 4 * sum(math.prod(spec.shape) for spec in schema.gguf_tensors(config))
    return wanted if wanted <= EXPAND_LIMIT else 0
