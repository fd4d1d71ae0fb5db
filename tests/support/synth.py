"""Small random checkpoints in the official layout, and the same weights under the names of transformers' model.

Nothing here uses dsv4: stored codes are drawn at random and decoded by the formulas of the format, so what dsv4 reads
from the file can be compared with what the file was meant to say. Scales are powers of two near 1 / sqrt(inputs).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FP4_VALUES = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Shape:
    """What varies between checkpoints; field names follow the configuration's, shortened."""

    ratios: tuple[int, ...] = (0, 0, 4, 128, 4)
    hidden: int = 256
    width: int = 128  # of an expert
    experts: int = 8
    chosen: int = 2
    hash_layers: int = 1
    heads: int = 4
    head_dim: int = 128
    q_rank: int = 128
    o_groups: int = 2
    o_rank: int = 64
    index_heads: int = 32  # with few, all products of a key can be negative, its score exactly 0, and zeros tie
    index_dim: int = 64
    index_topk: int = 16
    streams: int = 4
    rounds: int = 20
    limit: float = 10.0
    scaling: float = 1.5
    vocab: int = 512
    base: bool = False  # FP8 experts and float32 scales, as in the Base releases
    stages: int = 0  # drafting stages behind the trunk: 0, or 1 for the preview's MTP block
    dspark: bool = False  # the stages are DSpark's, which draft from the last three layers
    markov: int = 32
    shards: int = 1

    def config(self) -> dict[str, Any]:
        """config.json as the official releases write it."""
        return {
            "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 0, "eos_token_id": 1, "expert_dtype": "fp8" if self.base else "fp4", "hc_eps": 1e-6,
            "hc_mult": self.streams, "hc_sinkhorn_iters": self.rounds, "head_dim": self.head_dim, "hidden_act": "silu",
            "hidden_size": self.hidden, "index_head_dim": self.index_dim, "index_n_heads": self.index_heads,
            "index_topk": self.index_topk,
            "initializer_range": 0.02, "max_position_embeddings": 1048576, "model_type": "deepseek_v4",
            "moe_intermediate_size": self.width, "n_routed_experts": self.experts, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": self.heads, "num_experts_per_tok": self.chosen,
            "num_hidden_layers": len(self.ratios), "num_hash_layers": self.hash_layers, "num_key_value_heads": 1,
            "num_nextn_predict_layers": 1, "o_groups": self.o_groups, "o_lora_rank": self.o_rank,
            "q_lora_rank": self.q_rank, "qk_rope_head_dim": 64,
            "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                    "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                             "beta_slow": 1},
            "rope_theta": 10000, "routed_scaling_factor": self.scaling, "scoring_func": "sqrtsoftplus",
            "sliding_window": 128, "swiglu_limit": self.limit, "tie_word_embeddings": False, "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": self.vocab, "compress_rope_theta": 160000,
            "compress_ratios": [*self.ratios, *[0] * self.stages], **(self._dspark_config() if self.dspark else {})}

    def _dspark_config(self) -> dict[str, Any]:
        layers = len(self.ratios)
        return {"dspark_block_size": 5, "dspark_noise_token_id": self.vocab - 1,
                "dspark_target_layer_ids": list(range(layers - 3, layers)), "dspark_markov_rank": self.markov}


@dataclass
class Checkpoint:
    """The tensors under their official names, and the trunk's decoded values under transformers' names."""

    shape: Shape
    seed: int
    official: dict[str, Tensor] = field(default_factory=dict)
    decoded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self._root()
        for layer, ratio in enumerate(self.shape.ratios):
            by_hash = layer < self.shape.hash_layers
            self._layer(f"layers.{layer}.", f"model.layers.{layer}.", ratio, by_hash)
        for stage in range(self.shape.stages):
            self._stage(f"mtp.{stage}.")

    def write(self, folder: Path) -> Path:
        """config.json, shards and their index; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.shape.config(), indent=2))
        names = list(self.official)
        size = -(-len(names) // self.shape.shards)
        index: dict[str, str] = {}
        for number, start in enumerate(range(0, len(names), size), 1):
            file = f"model-{number:05d}-of-{self.shape.shards:05d}.safetensors"
            save_file({name: self.official[name] for name in names[start:start + size]}, folder / file)
            index |= dict.fromkeys(names[start:start + size], file)
        total = sum(tensor.nbytes for tensor in self.official.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
        return folder

    def _root(self) -> None:
        s = self.shape
        self.bf16("embed.weight", "model.embed_tokens.weight", self.normal(s.vocab, s.hidden))
        self.bf16("head.weight", "lm_head.weight", self.normal(s.vocab, s.hidden) * 3 / math.sqrt(s.hidden))
        self.norm("norm.weight", "model.norm.weight", s.hidden)
        self.mixer("hc_head", "model.hc_head.hc_", s.streams, 1)

    def _layer(self, name: str, other: str, ratio: int, by_hash: bool) -> None:
        s = self.shape
        mixes = (2 + s.streams) * s.streams
        self.norm(name + "attn_norm.weight", other + "input_layernorm.weight", s.hidden)
        self.norm(name + "ffn_norm.weight", other + "post_attention_layernorm.weight", s.hidden)
        self.mixer(name + "hc_attn", other + "attn_hc.", mixes, 3)
        self.mixer(name + "hc_ffn", other + "ffn_hc.", mixes, 3)
        self._attention(name + "attn.", other + "self_attn.")
        if ratio:
            self._compressor(name + "attn.compressor.", other + "self_attn.compressor.", ratio, s.head_dim)
        if ratio == 4:
            self._indexer(name + "attn.indexer.", other + "self_attn.compressor.indexer.")
        self._moe(name + "ffn.", other + "mlp.", by_hash)

    def _attention(self, name: str, other: str) -> None:
        s = self.shape
        heads = s.heads * s.head_dim
        self.fp8(name + "wq_a", other + "q_a_proj", s.q_rank, s.hidden)
        self.norm(name + "q_norm.weight", other + "q_a_norm.weight", s.q_rank)
        self.fp8(name + "wq_b", other + "q_b_proj", heads, s.q_rank)
        self.fp8(name + "wkv", other + "kv_proj", s.head_dim, s.hidden)
        self.norm(name + "kv_norm.weight", other + "kv_norm.weight", s.head_dim)
        self.fp8(name + "wo_a", other + "o_a_proj", s.o_groups * s.o_rank, heads // s.o_groups)
        self.fp8(name + "wo_b", other + "o_b_proj", s.hidden, s.o_groups * s.o_rank)
        self.f32(name + "attn_sink", other + "sinks", self.normal(s.heads))

    def _compressor(self, name: str, other: str, ratio: int, width: int) -> None:
        channels = (2 if ratio == 4 else 1) * width
        for own, theirs in (("wkv", "kv_proj"), ("wgate", "gate_proj")):
            values = self.normal(channels, self.shape.hidden) / math.sqrt(self.shape.hidden)
            self.bf16(f"{name}{own}.weight", f"{other}{theirs}.weight", values)
        self.f32(name + "ape", other + "position_bias", .3 * self.normal(ratio, channels))
        self.norm(name + "norm.weight", other + "kv_norm.weight", width)

    def _indexer(self, name: str, other: str) -> None:
        s = self.shape
        self.fp8(name + "wq_b", other + "q_b_proj", s.index_heads * s.index_dim, s.q_rank)
        self.bf16(name + "weights_proj.weight", other + "scorer.weights_proj.weight",
                  self.normal(s.index_heads, s.hidden) / math.sqrt(s.hidden))
        self._compressor(name + "compressor.", other, 4, s.index_dim)

    def _moe(self, name: str, other: str, by_hash: bool) -> None:
        s = self.shape
        gate = self.normal(s.experts, s.hidden) * 2 / math.sqrt(s.hidden)
        self.bf16(name + "gate.weight", other + "gate.weight", gate)
        if by_hash:
            rows = [torch.randperm(s.experts, generator=self.random)[:s.chosen] for _ in range(s.vocab)]
            self.official[name + "gate.tid2eid"] = self.decoded[other + "gate.tid2eid"] = torch.stack(rows)
        else:
            self.f32(name + "gate.bias", other + "gate.e_score_correction_bias", .1 * self.normal(s.experts))
        store = self.fp8 if s.base else self.fp4
        up, down = [], []
        for number in range(s.experts):
            expert = f"{name}experts.{number}."
            up.append(torch.cat([store(expert + each, None, s.width, s.hidden) for each in ("w1", "w3")]))
            down.append(store(expert + "w2", None, s.hidden, s.width))
        self.decoded[other + "experts.gate_up_proj"] = torch.stack(up)
        self.decoded[other + "experts.down_proj"] = torch.stack(down)
        for own, theirs, rows, columns in (("w1", "gate_proj", s.width, s.hidden), ("w3", "up_proj", s.width, s.hidden),
                                           ("w2", "down_proj", s.hidden, s.width)):
            self.fp8(f"{name}shared_experts.{own}", f"{other}shared_experts.{theirs}", rows, columns)

    def _stage(self, name: str) -> None:
        """A drafting stage has no counterpart in transformers, so its decoded values are forgotten again."""
        s, trunk = self.shape, dict(self.decoded)
        self._layer(name, name, 0, by_hash=False)
        first, last = name == "mtp.0.", name == f"mtp.{s.stages - 1}."
        projections = {"main_proj": 3 * s.hidden} if s.dspark else {"e_proj": s.hidden, "h_proj": s.hidden}
        norms = ["main_norm"] * first + ["norm"] * last if s.dspark else ["enorm", "hnorm", "norm"]
        for matrix, inputs in projections.items():
            if first:
                self.fp8(name + matrix, name + matrix, s.hidden, inputs)
        for vector in norms:
            self.norm(f"{name}{vector}.weight", f"{name}{vector}.weight", s.hidden)
        if last:
            self.mixer(name + "hc_head", name + "hc_head_", s.streams, 1)
        if s.dspark and last:
            for matrix in ("markov_w1", "markov_w2"):
                self.bf16(f"{name}markov_head.{matrix}.weight", matrix, self.normal(s.vocab, s.markov) / math.sqrt(s.markov))
            self.bf16(name + "confidence_head.proj.weight", "confidence", self.normal(1, s.hidden + s.markov))
        self.decoded = trunk

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def norm(self, name: str, other: str, size: int) -> None:
        self.bf16(name, other, 1 + .1 * self.normal(size))

    def mixer(self, name: str, other: str, mixes: int, scales: int) -> None:
        s = self.shape
        self.f32(name + "_fn", other + "fn", self.normal(mixes, s.streams * s.hidden) / math.sqrt(s.streams * s.hidden))
        self.f32(name + "_base", other + "base", .5 * self.normal(mixes))
        self.f32(name + "_scale", other + "scale", .5 + .2 * torch.rand(scales, generator=self.random))

    def f32(self, name: str, other: str, values: Tensor) -> None:
        self.official[name] = self.decoded[other] = values

    def bf16(self, name: str, other: str, values: Tensor) -> None:
        self.official[name] = values.to(torch.bfloat16)
        self.decoded[other] = self.official[name].float()

    def fp8(self, name: str, other: str | None, rows: int, columns: int) -> Tensor:
        """E4M3 codes of a normal distribution with one scale per 128 x 128 block (ragged at the edges)."""
        codes = (32 * self.normal(rows, columns)).to(torch.float8_e4m3fn)
        scale = self.scales(columns, 32, -(-rows // 128), -(-columns // 128))
        self.official[name + ".weight"] = codes
        self.official[name + ".scale"] = scale if self.shape.base else scale.to(torch.float8_e8m0fnu)
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        if other is not None:
            self.decoded[other + ".weight"] = codes.float() * spread
        return codes.float() * spread

    def fp4(self, name: str, other: str | None, rows: int, columns: int) -> Tensor:
        """Uniform E2M1 codes, the first of two in the low nibble, with one scale per row and 32 columns."""
        codes = torch.randint(0, 16, (rows, columns), generator=self.random, dtype=torch.uint8)
        scale = self.scales(columns, 3, rows, columns // 32)
        self.official[name + ".weight"] = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8)
        self.official[name + ".scale"] = scale.to(torch.float8_e8m0fnu)
        return FP4_VALUES[codes.long()] * scale.repeat_interleave(32, 1)

    def scales(self, inputs: int, spread: float, *shape: int) -> Tensor:
        """Powers of two, float32, so that codes of this spread become weights of about 1.4 / sqrt(inputs)."""
        middle = round(math.log2(1.4 / (spread * math.sqrt(inputs))))
        return torch.exp2(middle + torch.randint(-1, 2, shape, generator=self.random).float())


def transformers_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits [t, vocab], float32, of transformers' model with the decoded weights; ids [t]."""
    with torch.no_grad():
        return transformers_model(checkpoint)(ids[None], use_cache=False).logits[0]


def transformers_model(checkpoint: Checkpoint) -> Any:
    """transformers' model, float32, with the decoded weights."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    theirs = {"quantization_config", "expert_dtype", "architectures", "torch_dtype", "model_type", "topk_method"}
    config = {key: value for key, value in checkpoint.shape.config().items() if key not in theirs}
    rope = config.pop("rope_scaling")
    config["rope_parameters"] = {"rope_type": rope.pop("type"), **rope}
    config["compress_ratios"] = list(checkpoint.shape.ratios)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**config)).float().eval()
    left = model.load_state_dict(checkpoint.decoded, strict=False)
    assert not left.missing_keys, left.missing_keys
    assert not left.unexpected_keys, left.unexpected_keys
    return model
