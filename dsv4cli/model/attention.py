"""Attention of one layer: a window, and in most layers what lies before it, compressed."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.attention import Entries, sparse_attention
from dsv4_kernels.indexer import top_indices
from dsv4_kernels.linear import grouped_linear, linear
from dsv4_kernels.norm_rope import rms_norm, rotate
from dsv4_quant.config import ModelConfig
from dsv4cli.model.compressor import Compressor
from dsv4cli.model.numerics import Numerics
from dsv4cli.model.state import LayerState
from dsv4cli.model.step import Step
from dsv4cli.model.weights import AttentionWeights, IndexerWeights


class Attention:
    """Window attention; with compression also over entries; with an indexer over those that it picks."""

    def __init__(self, weights: AttentionWeights, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        self.weights = weights
        self.config = config
        self.ratio = ratio
        self.numerics = numerics
        self.compressor = self.indexer = None
        if weights.compressor is not None:
            self.compressor = Compressor(weights.compressor, ratio, config.rms_norm_eps, self._kept)
        if weights.indexer is not None:
            self.indexer = Indexer(weights.indexer, config, ratio, numerics)

    def __call__(self, x: Tensor, step: Step, state: LayerState) -> Tensor:
        """x [t, hidden], normed -> [t, hidden]; the tokens' keys join the state."""
        w, c = self.weights, self.config
        turns = step.compress_turns if self.ratio else step.window_turns
        latent = rms_norm(linear(x, w.wq_a), w.q_norm, c.rms_norm_eps)
        q = linear(latent, w.wq_b).unflatten(-1, (c.num_attention_heads, c.head_dim))
        q = rotate(rms_norm(q, None, c.rms_norm_eps), turns)
        kv = rotate(rms_norm(linear(x, w.wkv), w.kv_norm, c.rms_norm_eps), turns)

        recent = state.ring.push(self._kept(kv), step.start)
        entries = self._entries(x, latent, step, state)
        out = sparse_attention(q, recent, entries, w.sink, c.sliding_window)

        # A key carries its rotation into the value it also is; turning back leaves only the distance to the query.
        groups = rotate(out, turns, inverse=True).reshape(len(x), c.o_groups, -1)
        return linear(grouped_linear(groups, w.wo_a).flatten(1), w.wo_b)

    def _entries(self, x: Tensor, latent: Tensor, step: Step, state: LayerState) -> Entries | None:
        """What of the compressed past each token sees."""
        if self.compressor is None or state.entries is None:
            return None
        self.compressor(x, step, state.entries)
        visible = step.groups(self.ratio).visible
        chosen = self.indexer(x, latent, visible, step, state) if self.indexer is not None else None
        return Entries(state.entries.store.filled, visible, chosen)

    def _kept(self, kv: Tensor) -> Tensor:
        return self.numerics.kv(kv, self.config.qk_rope_head_dim)


class Indexer:
    """Small queries over small keys of the same groups: which entries are worth the attention's while."""

    def __init__(self, weights: IndexerWeights, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        self.weights = weights
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.numerics = numerics
        self.compressor = Compressor(weights.compressor, ratio, config.rms_norm_eps, numerics.index)

    def __call__(self, x: Tensor, latent: Tensor, visible: Tensor, step: Step, state: LayerState) -> Tensor | None:
        """Indices int64 [t, topk] of entries (-1: none), or None while there are no more than topk."""
        assert state.index is not None, "a layer with an indexer keeps index keys"
        self.compressor(x, step, state.index)
        keys = state.index.store.filled
        if len(keys) <= self.topk:
            return None
        q = linear(latent, self.weights.wq_b).unflatten(-1, (self.heads, self.width))
        q = self.numerics.index(rotate(q, step.compress_turns))
        return top_indices(q, linear(x, self.weights.weights_proj), keys, visible, self.topk)
