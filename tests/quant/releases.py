"""Configurations of the published releases, from the table of spec/checkpoint.md section 1.1."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_act": "silu",
    "index_head_dim": 128, "index_n_heads": 64, "initializer_range": 0.02, "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4", "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_lora_rank": 1024,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "scoring_func": "sqrtsoftplus",
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
    "sliding_window": 128, "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 129280,
    "compress_rope_theta": 160000,
}  # fmt: skip
FLASH = COMMON | {
    "hidden_size": 4096, "index_topk": 512, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_attention_heads": 64, "num_hidden_layers": 43, "o_groups": 8, "q_lora_rank": 1024, "routed_scaling_factor": 1.5,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
PRO = COMMON | {
    "hidden_size": 7168, "index_topk": 1024, "moe_intermediate_size": 3072, "n_routed_experts": 384,
    "num_attention_heads": 128, "num_hidden_layers": 61, "o_groups": 16, "q_lora_rank": 1536, "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}  # fmt: skip


def dspark(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """The release with three DSpark stages in place of the MTP block."""
    last = config["num_hidden_layers"] - 1
    return config | {
        "compress_ratios": [*config["compress_ratios"], 0, 0], "dspark_block_size": 5, "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [last - 2, last - 1, last], "dspark_markov_rank": rank,
    }  # fmt: skip


FLASH_0731 = dspark(FLASH, 256)
PRO_0813 = dspark(PRO, 512)
