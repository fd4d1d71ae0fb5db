"""The bytes that a decoding step reads, counted by hand on a random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_kernels import backends
from dsv4_quant.files import open_source
from dsv4cli.engine.bench import STRETCH, _decode, bytes_per_token
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


def test_bandwidth_belongs_to_the_moments_of_the_tokens(tmp_path: Path) -> None:
    """Four tokens between 2 and 6 bytes a second count as at 4, two more between 6 and 10 as at 8."""
    model = Model.bind(open_source(Checkpoint(Shape(), 1).write(tmp_path)), numerics="plain")
    state, looks = model.new_state(8), iter((2.0, 6.0, 10.0))
    seconds, bandwidth = _decode(model, state, state.snapshot(), torch.arange(STRETCH + 2), lambda: next(looks))
    assert bandwidth == 6 / (4 / 4 + 2 / 8)
    assert seconds > 0
    assert state.position == STRETCH + 2


@pytest.mark.skipif(backends.cpu_trouble() is not None, reason="there are no kernels to read with")
def test_a_reader_goes_through_its_buffer_round_and_round() -> None:
    reader = backends.reader(3 << 20)  # rounded up to two large pages
    assert min(reader.rate(size) for size in (3 << 20, 1 << 20, 1 << 19, None)) > 0
