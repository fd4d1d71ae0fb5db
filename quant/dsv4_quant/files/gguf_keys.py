"""A GGUF's keys as the official config.json would say it (spec/checkpoint.md sections 5.1 and 5.5).

llama.cpp and antirez/ds4 write the same keys with small differences: number types, scalars or arrays, and a vocab_size that only
ds4 has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4_quant.errors import CorruptFile, UnsupportedModel

ARCHITECTURE = "deepseek4"
# config.json key -> GGUF key behind "deepseek4."; a tuple adds the value that stands for a missing key.
KEYS: dict[str, str | tuple[str, Any]] = {
    "hidden_size": "embedding_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_hash_layers": "hash_layer_count",
    "num_attention_heads": "attention.head_count",
    "head_dim": ("attention.key_length", 512),
    "qk_rope_head_dim": ("rope.dimension_count", 64),
    "q_lora_rank": "attention.q_lora_rank",
    "o_groups": "attention.output_group_count",
    "o_lora_rank": "attention.output_lora_rank",
    "n_routed_experts": "expert_count",
    "n_shared_experts": ("expert_shared_count", 1),
    "num_experts_per_tok": "expert_used_count",
    "routed_scaling_factor": "expert_weights_scale",
    "swiglu_limit": "swiglu_clamp_exp",
    "sliding_window": "attention.sliding_window",
    "rope_theta": ("rope.freq_base", 10000.0),
    "compress_rope_theta": "attention.compress_rope_freq_base",
    "max_position_embeddings": "context_length",
    "hc_mult": "hyper_connection.count",
    "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
    "hc_eps": "hyper_connection.epsilon",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
}
CONSTANTS = {
    "attention.head_count_kv": 1,
    "expert_gating_func": 4,  # square root of softplus
    "expert_weights_norm": True,
    "rope.scaling.type": "yarn",
}
ROPE = {
    "factor": ("rope.scaling.factor", 16.0),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", 65536),
    "beta_fast": ("rope.scaling.yarn_beta_fast", 32.0),
    "beta_slow": ("rope.scaling.yarn_beta_slow", 1.0),
}

OWN_FILE = "Give the model's own file."
OTHERS = {"deepseek41": "DeepSeek-V4.1 is not supported yet.",
          "dflash": f"Those are DSpark stages, which draft for a model. {OWN_FILE}"}  # architecture -> hint


def config_dict(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, Any]:
    """The official configuration of a GGUF. Raises UnsupportedModel and, for a missing key, CorruptFile."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedModel(
            f"{origin} holds a {architecture!r} model, not DeepSeek-V4 ({ARCHITECTURE!r}).",
            OTHERS.get(str(architecture), "dsv4 runs DeepSeek-V4 only."),
        )
    if "blk.0.attn_norm.weight" not in shapes and any(".nextn." in name or name.startswith("mtp.0.") for name in shapes):
        raise UnsupportedModel(f"{origin} holds the MTP block of a model, not the model.", OWN_FILE)
    reader = _Keys(metadata, origin)
    _check_constants(metadata, origin)
    config = {ours: _decimal(_scalar(reader(theirs), ours, origin)) for ours, theirs in KEYS.items()}
    config["rope_scaling"] = {ours: _decimal(_scalar(reader(theirs), ours, origin)) for ours, theirs in ROPE.items()}
    embedding = shapes.get("token_embd.weight")
    config["vocab_size"] = embedding[0] if embedding else reader("vocab_size")
    config["compress_ratios"] = reader("attention.compress_ratios")
    config["model_type"] = "deepseek_v4"
    config["architectures"] = ["DeepseekV4ForCausalLM"]
    config["num_hidden_layers"] = _trunk(config["num_hidden_layers"], shapes)
    for ours, key in (("bos_token_id", "tokenizer.ggml.bos_token_id"), ("eos_token_id", "tokenizer.ggml.eos_token_id")):
        if key in metadata:
            config[ours] = metadata[key]
    return config


class _Keys:
    def __init__(self, metadata: Mapping[str, Any], origin: str) -> None:
        self.metadata, self.origin = metadata, origin

    def __call__(self, wanted: str | tuple[str, Any]) -> Any:
        key = f"{ARCHITECTURE}.{wanted if isinstance(wanted, str) else wanted[0]}"
        if key in self.metadata:
            return self.metadata[key]
        if isinstance(wanted, tuple):
            return wanted[1]
        raise CorruptFile(f"{self.origin} has no key {key}.", "Convert the model again with a current converter.")


def _trunk(blocks: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Layers without the drafting blocks, which llama.cpp counts behind them; only tensors tell whether there are any."""
    while isinstance(blocks, int) and f"blk.{blocks - 1}.nextn.eh_proj.weight" in shapes:
        blocks -= 1
    return blocks


def _check_constants(metadata: Mapping[str, Any], origin: str) -> None:
    """Refuses what would be computed wrongly: a key with another value than every DeepSeek-V4 has."""
    for key, value in CONSTANTS.items():
        key = f"{ARCHITECTURE}.{key}"
        found = _scalar(metadata.get(key, value), key, origin)
        if found != value:
            raise UnsupportedModel(f"{origin}: {key} is {found!r}, not {value!r}.", "dsv4 runs DeepSeek-V4 only.")


def _scalar(value: Any, name: str, origin: str) -> Any:
    """A key that may be written once or once a layer."""
    if not isinstance(value, list) or not value:
        return value
    other = next((entry for entry in value if entry != value[0]), value[0])
    if other != value[0]:
        raise UnsupportedModel(
            f"{origin}: {name} is {value[0]!r} in some layers and {other!r} in others.",
            "dsv4 knows one for all layers.",
        )
    return value[0]


def _decimal(value: Any) -> Any:
    """A float32 as the decimal number that it was written from: 1e-6, not 9.99999997e-7."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
