"""Attention of one layer: a window, and in most layers what lies before it, compressed."""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.attention import Entries, sparse_attention
from dsv4_kernels.indexer import top_indices
from dsv4_kernels.linear import Norm, grouped_linear, linears
from dsv4_kernels.prologue import Compression, Keeping, Queries, attention_prologue
from dsv4_kernels.residual import Joined, Residual, project_into_streams
from dsv4_quant.config import ModelConfig
from dsv4cli.model.compressor import Compressor
from dsv4cli.model.numerics import Numerics
from dsv4cli.model.state import LayerState
from dsv4cli.model.step import Step
from dsv4cli.model.weights import AttentionWeights, IndexerWeights


class Attention:
    """Window attention; with compression also over entries; with an indexer over those that it picks.

    All that is projected from one input is projected in one call: the input by `of_x`, the latent query by wq_b and, where
    there are entries to choose among, by the indexer's.
    """

    def __init__(self, weights: AttentionWeights, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        self.weights = weights
        self.config = config
        self.ratio = ratio
        self.numerics = numerics
        self.compressor = self.indexer = None
        self.norm_q = Norm(weights.q_norm, config.rms_norm_eps)
        self.of_x = [weights.wq_a, weights.wkv]
        if weights.compressor is not None:
            self.compressor = Compressor(weights.compressor, ratio, numerics.kv)
            self.of_x += [weights.compressor.wkv, weights.compressor.wgate]
        if weights.indexer is not None:
            self.indexer = Indexer(weights.indexer, config, ratio, numerics)
            self.of_x += self.indexer.of_x

    def __call__(self, x: Tensor, step: Step, state: LayerState, residual: Residual) -> Joined:
        """x [t, hidden], normed; what comes out joins the streams, and the tokens' keys the state."""
        w, c = self.weights, self.config
        turns = step.compress_turns if self.ratio else step.window_turns
        latent, kv, *compressed = linears(x, self.of_x)
        choosing = [self.indexer.weights.wq_b] if self.indexer is not None and self.indexer.chooses(step.start + len(x)) else []
        q, *index_q = linears(latent, [w.wq_b, *choosing], self.norm_q)
        q = q.unflatten(-1, (c.num_attention_heads, c.head_dim))

        keys, row = state.ring.place(step)
        compressions, queries = self._of_entries(compressed, index_q, step, state)
        turned = attention_prologue(kv, Keeping(w.kv_norm, turns, self.numerics.kv, keys, row), compressions, queries,
                                    c.rms_norm_eps, step.start, step.live)
        recent = state.ring.push(keys, step)
        entries = self._entries(compressed, turned, step, state)
        # A key carries its rotation into the value it also is; turning back leaves only the distance to the query.
        out = sparse_attention(q, recent, entries, w.sink, c.sliding_window, turns, step.live, c.rms_norm_eps)
        out = grouped_linear(out.reshape(len(x), c.o_groups, -1), w.wo_a).flatten(1)
        return project_into_streams(out, w.wo_b, residual)

    def _of_entries(self, projected: list[Tensor], index_q: list[Tensor], step: Step,
                    state: LayerState) -> tuple[list[Compression], Queries | None]:
        """What compressors take of the step, and index queries; index_q is empty where nothing has to be chosen."""
        if self.compressor is None or state.entries is None:
            return [], None
        kv, scores, *of_indexer = projected
        own = self.compressor(kv, scores, step, state.entries)
        if self.indexer is None or state.index is None:
            return [own], None
        kv, scores, _ = of_indexer
        index = self.indexer.compressor(kv, scores, step, state.index)
        return [own, index], self.indexer.queries(index_q[0], step) if index_q else None

    def _entries(self, projected: list[Tensor], queries: Tensor | None, step: Step, state: LayerState) -> Entries | None:
        """What of the compressed past each token sees."""
        if state.entries is None:
            return None
        visible = step.groups(self.ratio).visible
        chosen = None
        if self.indexer is not None and state.index is not None and queries is not None:
            chosen = top_indices(queries, projected[-1], state.index.store.seen(step), visible, self.indexer.topk)
        return Entries(state.entries.store.seen(step), visible, chosen)


class Indexer:
    """Small queries over small keys of the same groups: which entries are worth the attention's while."""

    def __init__(self, weights: IndexerWeights, config: ModelConfig, ratio: int, numerics: Numerics) -> None:
        self.weights = weights
        self.ratio = ratio
        self.heads, self.width, self.topk = config.index_n_heads, config.index_head_dim, config.index_topk
        self.numerics = numerics
        self.compressor = Compressor(weights.compressor, ratio, numerics.index)
        self.of_x = [weights.compressor.wkv, weights.compressor.wgate, weights.weights_proj]

    def chooses(self, tokens: int) -> bool:
        """Whether the entries of so many tokens are more than attention may look at."""
        return tokens // self.ratio > self.topk

    def queries(self, projected: Tensor, step: Step) -> Queries:
        """projected: the latent query by wq_b [t, heads * width]."""
        return Queries(projected.unflatten(-1, (self.heads, self.width)), step.compress_turns, self.numerics.index)
