"""The bytes that a decoding step reads, counted by hand on a random model."""

from __future__ import annotations

from pathlib import Path

from dsv4_quant.files import open_source
from dsv4cli.engine.bench import bytes_per_token
from dsv4cli.model.transformer import Model
from tests.support.synth import Checkpoint, Shape


def test_only_chosen_experts_and_one_embedding_are_read(tmp_path: Path) -> None:
    shape = Shape()
    model = Model.bind(open_source(Checkpoint(shape, 1).write(tmp_path)), numerics="plain", expand_limit=0)
    config = model.config
    experts = sum(part.nbytes for layer in model.weights.layers for expert in layer.moe.experts for part in expert)
    tables = sum(layer.moe.table.nbytes for layer in model.weights.layers if layer.moe.table is not None)
    unread = experts * (1 - config.num_experts_per_tok / config.n_routed_experts)
    embeddings = model.weights.embed.nbytes * (1 - 1 / config.vocab_size)
    windows = config.num_hidden_layers * config.head_dim * 4  # the token's own key
    assert abs(bytes_per_token(model, 0) - (model.weight_bytes - unread - embeddings - tables + windows)) < 2
