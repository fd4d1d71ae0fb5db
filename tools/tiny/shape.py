"""The shape of `tiny`: its config.json and the complete list of its stored tensors.

Names, dtypes and shapes are those of the official DeepSeek-V4 layout (spec/checkpoint.md section 2.3), only smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["bf16", "f32", "fp8", "fp4", "i64"]

VOCAB_SIZE = 1700
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 64,
    "index_n_heads": 4,
    "index_topk": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 65536,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 4, 128, 4, 0],
}


@dataclass(frozen=True)
class Spec:
    """One stored weight: official name without `.scale` twin, logical shape, stored format."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


def specs(config: dict[str, Any] = CONFIG) -> list[Spec]:
    """Every weight of the model in file order: embedding, trunk layers, top, MTP block."""
    V, D, mult = config["vocab_size"], config["hidden_size"], config["hc_mult"]
    found = [Spec("embed.weight", (V, D), "bf16")]
    for layer in range(config["num_hidden_layers"]):
        found += _block(config, f"layers.{layer}.", config["compress_ratios"][layer], layer < config["num_hash_layers"])
    found += [*_hc_head("", D, mult), Spec("norm.weight", (D,), "bf16"), Spec("head.weight", (V, D), "bf16")]
    found += [Spec(f"mtp.0.{n}.weight", (D, D), "fp8") for n in ("e_proj", "h_proj")]
    found += [Spec(f"mtp.0.{n}.weight", (D,), "bf16") for n in ("enorm", "hnorm", "norm")]
    found += _hc_head("mtp.0.", D, mult)
    found += _block(config, "mtp.0.", 0, hashed=False)
    return found


def _hc_head(prefix: str, D: int, mult: int) -> list[Spec]:
    shapes = {"fn": (mult, mult * D), "base": (mult,), "scale": (1,)}
    return [Spec(f"{prefix}hc_head_{n}", s, "f32") for n, s in shapes.items()]


def _block(c: dict[str, Any], prefix: str, ratio: int, hashed: bool) -> Iterator[Spec]:
    D, mult = c["hidden_size"], c["hc_mult"]
    mix = (2 + mult) * mult
    for half in ("attn", "ffn"):
        yield Spec(f"{prefix}hc_{half}_fn", (mix, mult * D), "f32")
        yield Spec(f"{prefix}hc_{half}_base", (mix,), "f32")
        yield Spec(f"{prefix}hc_{half}_scale", (3,), "f32")
        yield Spec(f"{prefix}{half}_norm.weight", (D,), "bf16")
    yield from _attention(c, f"{prefix}attn.", ratio)
    yield from _experts(c, f"{prefix}ffn.", hashed)


def _attention(c: dict[str, Any], p: str, ratio: int) -> Iterator[Spec]:
    D, heads, dim, rank = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    groups, out_rank = c["o_groups"], c["o_lora_rank"]
    yield Spec(p + "attn_sink", (heads,), "f32")
    yield Spec(p + "wq_a.weight", (rank, D), "fp8")
    yield Spec(p + "q_norm.weight", (rank,), "bf16")
    yield Spec(p + "wq_b.weight", (heads * dim, rank), "fp8")
    yield Spec(p + "wkv.weight", (dim, D), "fp8")
    yield Spec(p + "kv_norm.weight", (dim,), "bf16")
    yield Spec(p + "wo_a.weight", (groups * out_rank, heads * dim // groups), "fp8")
    yield Spec(p + "wo_b.weight", (D, groups * out_rank), "fp8")
    if ratio:
        yield from _compressor(p + "compressor.", ratio, dim, D)
    if ratio == 4:
        i_heads, i_dim = c["index_n_heads"], c["index_head_dim"]
        yield Spec(p + "indexer.wq_b.weight", (i_heads * i_dim, rank), "fp8")
        yield Spec(p + "indexer.weights_proj.weight", (i_heads, D), "bf16")
        yield from _compressor(p + "indexer.compressor.", ratio, i_dim, D)


def _compressor(p: str, ratio: int, dim: int, D: int) -> Iterator[Spec]:
    width = 2 * dim if ratio == 4 else dim
    yield Spec(p + "ape", (ratio, width), "f32")
    yield Spec(p + "wkv.weight", (width, D), "bf16")
    yield Spec(p + "wgate.weight", (width, D), "bf16")
    yield Spec(p + "norm.weight", (dim,), "bf16")


def _experts(c: dict[str, Any], p: str, hashed: bool) -> Iterator[Spec]:
    D, width, count = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
    shapes = {"w1": (width, D), "w2": (D, width), "w3": (width, D)}
    yield Spec(p + "gate.weight", (count, D), "bf16")
    if hashed:
        yield Spec(p + "gate.tid2eid", (c["vocab_size"], c["num_experts_per_tok"]), "i64")
    else:
        yield Spec(p + "gate.bias", (count,), "f32")
    for expert in range(count):
        yield from (Spec(f"{p}experts.{expert}.{n}.weight", s, "fp4") for n, s in shapes.items())
    yield from (Spec(f"{p}shared_experts.{n}.weight", s, "fp8") for n, s in shapes.items())


def stored_bytes(spec: Spec) -> int:
    """Bytes of the weight and of its scales in the checkpoint."""
    count = 1
    for n in spec.shape:
        count *= n
    if spec.kind == "fp4":
        return count // 2 + count // 32
    if spec.kind == "fp8":
        rows, cols = spec.shape
        return count + -(-rows // 128) * -(-cols // 128)
    return count * {"bf16": 2, "f32": 4, "i64": 8}[spec.kind]


if __name__ == "__main__":
    print(f"{sum(stored_bytes(s) for s in specs()):,} bytes of weights, {len(specs())} weights")
