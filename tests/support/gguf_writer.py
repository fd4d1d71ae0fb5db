"""Writes a GGUF from any open checkpoint: keys, names and types as llama.cpp's converter has them, or as antirez/ds4 does.

Only the trunk is written, as the converter does by default. By default matrices that the checkpoint stores with scales (FP8,
FP4) become the type asked for and everything else float32, so that nothing but that type can make a difference. Facts:
spec/checkpoint.md sections 5.1, 5.2 and 5.5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.files import Source
from dsv4_quant.formats import FORMATS, Packed

# A tensor's type, from its place in the schema and one of its parts as it is stored.
Choice = Callable[[schema.GgufSpec, Packed], Kind]


class Typed(NamedTuple):
    """A key's value, written as a type other than the usual one."""

    value: Any
    kind: Value
    inner: Value | None = None


PREFIX = "deepseek4."
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def quantised_as(kind: Kind) -> Choice:
    """`kind` for what the checkpoint quantises, float32 for the rest."""
    return lambda spec, part: kind if part.scale is not None else Kind.F32


def as_converted(spec: schema.GgufSpec, part: Packed) -> Kind:
    """The types of llama.cpp's converter."""
    if part.scale is not None:
        return Kind.MXFP4 if spec.role == "routed_expert" else Kind.Q8_0
    return Kind.BF16 if part.format == "bf16" and len(spec.shape) > 1 else Kind.F32


def as_ds4(spec: schema.GgufSpec, part: Packed) -> Kind:
    """The types of antirez/ds4, with Q4_0 where it has Q4_K, for rows of no 256 elements."""
    if spec.role == "routed_expert":
        return Kind.Q4_0
    if len(spec.shape) == 1:
        return Kind.F32
    if spec.role in ("attention", "shared_expert", "head"):
        return Kind.Q8_0
    return Kind.F16


def as_ds4_in_two_bits(spec: schema.GgufSpec, part: Packed) -> Kind:
    """Its published 81 GB file: gate and up IQ2_XXS, down Q2_K. Rows have to be multiples of 256."""
    if spec.role == "routed_expert":
        return Kind.Q2_K if "down" in spec.name else Kind.IQ2_XXS
    return as_ds4(spec, part)


def as_ds4_in_four_bits(spec: schema.GgufSpec, part: Packed) -> Kind:
    """Its published 153 GB file."""
    return Kind.Q4_K if spec.role == "routed_expert" else as_ds4(spec, part)


def ds4_keys(config: ModelConfig) -> Callable[[dict[str, Any]], None]:
    """Edits the converter's keys into those of antirez/ds4, which has `vocab_size`, leaves others out and, here, every type of
    number that it may have for a key and the converter does not."""

    def edit(keys: dict[str, Any]) -> None:
        keys["vocab_size"] = config.vocab_size
        keys.update({"expert_group_count": 0, "expert_group_used_count": 0})
        original = "rope.scaling.original_context_length"
        keys[original] = Typed(keys[original], Value.UINT64)
        for key, inner in (("attention.compress_ratios", Value.UINT32), ("swiglu_clamp_exp", Value.FLOAT64)):
            keys[key] = Typed(keys[key], Value.ARRAY, inner)
        keys.update(dict.fromkeys(("swiglu_clamp_shexp", "expert_gating_func", "embedding_length_out")))

    return edit


def write(
    source: Source,
    path: Path,
    kind: Kind | Choice = Kind.BF16,
    *,
    parts: int = 1,
    change_keys: Callable[[dict[str, Any]], None] = lambda keys: None,
) -> Path:
    """Writes `source` to `path`; returns the file to open: the first part, when there are several.

    `change_keys` may edit the keys behind "deepseek4." before they are written (None drops one).
    """
    specs = list(schema.gguf_tensors(source.config))
    most = -(-len(specs) // parts)
    writer = gguf.GGUFWriter(path, "deepseek4", split_max_tensors=most if parts > 1 else 0)
    keys = model_keys(source.config)
    change_keys(keys)
    for key, value in keys.items():
        _add(writer, PREFIX + key, value)
    add_tokenizer(writer, source)
    choose = quantised_as(kind) if isinstance(kind, Kind) else kind
    for spec in specs:
        _add_tensor(writer, spec, [source.read(name) for name in spec.official], choose)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else part_path(path, 0, -(-len(specs) // most))


def part_path(path: Path, number: int, parts: int) -> Path:
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{parts:05d}.gguf")


def model_keys(c: ModelConfig) -> dict[str, Any]:
    """Keys behind "deepseek4.": int is written as u32, float as f32, lists as arrays of i32 or f32."""
    return {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "embedding_length_out": c.hc_mult * c.hidden_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.compress_ratios": list(c.compress_ratios),
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.rope_scaling.factor,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "expert_gating_func": 4,
        "swiglu_clamp_exp": [c.swiglu_limit] * c.num_hidden_layers,
        "swiglu_clamp_shexp": [c.swiglu_limit] * c.num_hidden_layers,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": c.hc_eps,
        "hash_layer_count": c.num_hash_layers,
    }


def add_tokenizer(writer: gguf.GGUFWriter, source: Source) -> None:
    """The tokenizer of the source; one without any becomes the model "none", which both runners accept."""
    found = source.tokenizer()
    if found is None:
        writer.add_tokenizer_model("none")
        return
    data = json.loads(found.read_text(encoding="utf-8")) if isinstance(found, Path) else found
    tokens, types = tokens_of(data, source.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("joyai-llm")  # what the converter takes DeepSeek-V4's pre-tokenizer for
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(source.config.bos_token_id)
    writer.add_eos_token_id(source.config.eos_token_id)
    writer.add_pad_token_id(source.config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def tokens_of(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Spelling and GGUF kind of every id of a tokenizer.json; ids that it does not use are padded."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for spelling, i in data["model"]["vocab"].items():
        tokens[i], types[i] = spelling, ORDINARY
    for token in data["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, Typed):
        writer.add_key_value(key, value.value, value.kind, value.inner)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tensor(writer: gguf.GGUFWriter, spec: schema.GgufSpec, parts: list[Packed], choose: Choice) -> None:
    if parts[0].format in ("i64", "i32"):
        writer.add_tensor(spec.name, parts[0].data.numpy().astype(np.int32))
        return
    values = torch.stack([part.float() for part in parts]).reshape(spec.shape).numpy()
    kind = choose(spec, parts[0])
    writer.add_tensor(spec.name, _encoded(values, kind), raw_dtype=kind)


def _encoded(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """By the gguf package where it can; what it cannot write it reads, and tests/quant holds our encoders against that."""
    try:
        encoded: np.ndarray[Any, Any] = gguf.quantize(values, kind)
    except NotImplementedError:
        encode = FORMATS[kind.name.lower()].encode
        assert encode is not None
        rows = torch.from_numpy(values).flatten(0, -2)
        encoded = encode(rows, None).numpy().reshape(*values.shape[:-1], -1)
    return encoded
