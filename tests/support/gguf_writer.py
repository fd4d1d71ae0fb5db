"""Writes a model as llama.cpp's converter would: keys, names and types of spec/checkpoint.md sections 5.1 and 5.2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from dsv4_quant import schema
from dsv4_quant.files import Source

Kind = gguf.GGMLQuantizationType
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def write(source: Source, path: Path, kind: Kind = Kind.BF16, *, parts: int = 1) -> Path:
    """The trunk of `source`, in one file or split into `parts` (then the first part's path comes back).

    Matrices that are quantised there become `kind`; everything else float32, tables I32.
    """
    specs = list(schema.gguf_tensors(source.config))
    size = -(-len(specs) // parts)
    for number in range(parts):
        file = path if parts == 1 else part_path(path, number, parts)
        writer = gguf.GGUFWriter(file, "deepseek4")
        if number == 0:
            write_keys(writer, source)
            write_tokenizer(writer, source)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(specs))
        for spec in specs[number * size : (number + 1) * size]:
            _add(writer, source, spec, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path if parts == 1 else part_path(path, 0, parts)


def part_path(path: Path, number: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")


def _add(writer: gguf.GGUFWriter, source: Source, spec: schema.GgufSpec, kind: Kind) -> None:
    pieces = [source.read(name) for name in spec.official]
    if pieces[0].format == "i64":
        writer.add_tensor(spec.name, pieces[0].data.numpy().astype(np.int32))
        return
    values = torch.stack([piece.float() for piece in pieces]).reshape(spec.shape).numpy()
    stored = kind if pieces[0].scale is not None else Kind.F32
    writer.add_tensor(spec.name, gguf.quantize(values, stored), raw_dtype=stored)


def write_keys(writer: gguf.GGUFWriter, source: Source) -> None:
    """The architecture's metadata."""
    c, own = source.config, "deepseek4."
    whole = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "embedding_length_out": c.hc_mult * c.hidden_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window, "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank, "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim, "attention.indexer.top_k": c.index_topk,
        "rope.dimension_count": c.qk_rope_head_dim, "expert_count": c.n_routed_experts,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
        "expert_used_count": c.num_experts_per_tok, "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size, "expert_gating_func": 4, "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult, "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
    }  # fmt: skip
    real = {
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.compress_rope_freq_base": c.compress_rope_theta,
        "rope.freq_base": c.rope_theta, "rope.scaling.factor": c.rope_scaling.factor, "hyper_connection.epsilon": c.hc_eps,
        "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast, "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
        "expert_weights_scale": c.routed_scaling_factor,
    }  # fmt: skip
    for key, value in whole.items():
        writer.add_uint32(own + key, int(value))
    for key, value in real.items():
        writer.add_float32(own + key, float(value))
    writer.add_string(own + "rope.scaling.type", "yarn")
    writer.add_bool(own + "expert_weights_norm", True)
    writer.add_array(own + "attention.compress_ratios", [int(ratio) for ratio in c.compress_ratios])
    for name in ("exp", "shexp"):
        writer.add_array(f"{own}swiglu_clamp_{name}", [float(c.swiglu_limit)] * c.num_hidden_layers)


def write_tokenizer(writer: gguf.GGUFWriter, source: Source) -> None:
    """The tokenizer's keys, where the source has one."""
    found = source.tokenizer()
    if found is None:
        return
    data: dict[str, Any] = json.loads(found.read_text(encoding="utf-8")) if isinstance(found, Path) else found
    size = source.config.vocab_size
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for spelling, i in data["model"]["vocab"].items():
        tokens[i], kinds[i] = spelling, NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("joyai-llm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]])
    writer.add_bos_token_id(source.config.bos_token_id)
    writer.add_eos_token_id(source.config.eos_token_id)
    writer.add_pad_token_id(source.config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
