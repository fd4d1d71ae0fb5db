"""A GGUF gives the logits of the checkpoint that it was written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4_quant import schema
from dsv4_quant.files import Source, open_source
from dsv4cli.model.transformer import Model
from tests.support.tolerance import RELATIVE, assert_close

Kind = gguf.GGMLQuantizationType


def write_keys(writer: gguf.GGUFWriter, source: Source) -> None:
    """The metadata of llama.cpp's converter (spec/checkpoint.md section 5.1), without a tokenizer."""
    c, own = source.config, "deepseek4."
    whole = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window, "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank, "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim, "attention.indexer.top_k": c.index_topk,
        "rope.dimension_count": c.qk_rope_head_dim, "expert_count": c.n_routed_experts,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
        "expert_used_count": c.num_experts_per_tok, "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size, "expert_gating_func": 4, "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult, "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters}
    real = {
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.compress_rope_freq_base": c.compress_rope_theta,
        "rope.freq_base": c.rope_theta, "rope.scaling.factor": c.rope_scaling.factor, "hyper_connection.epsilon": c.hc_eps,
        "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast, "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
        "expert_weights_scale": c.routed_scaling_factor}
    for key, value in whole.items():
        writer.add_uint32(own + key, int(value))
    for key, value in real.items():
        writer.add_float32(own + key, float(value))
    writer.add_bool(own + "expert_weights_norm", True)
    writer.add_array(own + "attention.compress_ratios", [int(ratio) for ratio in c.compress_ratios])
    writer.add_array(own + "swiglu_clamp_exp", [float(c.swiglu_limit)] * c.num_hidden_layers)


def write(source: Source, path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The trunk of `source`: matrices that are quantised there as `kind`, all else as float32, tables as I32."""
    writer = gguf.GGUFWriter(path, "deepseek4")
    write_keys(writer, source)
    for spec in schema.gguf_tensors(source.config):
        parts = [source.read(name) for name in spec.official]
        if parts[0].format == "i64":
            writer.add_tensor(spec.name, parts[0].data.numpy().astype(np.int32))
            continue
        values = torch.stack([part.float() for part in parts]).reshape(spec.shape).numpy()
        stored = kind if parts[0].scale is not None else Kind.F32
        writer.add_tensor(spec.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("expand_limit", [0, 1 << 40])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_lossless_types_give_the_same_logits(kind: gguf.GGMLQuantizationType, expand_limit: int, checkpoint: Path, ids: Tensor,
                                             tmp_path: Path) -> None:
    """FP8 and FP4 codes times powers of two are exact in bf16, so nothing may change."""
    official = open_source(checkpoint)
    other = open_source(write(official, tmp_path / "model.gguf", kind))
    assert other.layout == "gguf"
    logits = []
    for source in (official, other):
        model = Model.bind(source, numerics="plain", expand_limit=expand_limit)
        logits.append(model.forward(ids[:60], model.new_state(60), logits="all"))
    assert_close(logits[1], logits[0], RELATIVE[torch.float32])
