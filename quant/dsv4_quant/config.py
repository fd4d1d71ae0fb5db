"""The configuration of a DeepSeek-V4 model, under the names of the official config.json (spec/checkpoint.md section 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from dsv4_quant.errors import CorruptFile, UnsupportedModel

MODEL_TYPE = "deepseek_v4"
RATIOS = (0, 4, 128)  # window only, overlapping groups with an indexer, long groups


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, for the layers that compress."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model. `compress_ratios` has an entry per trunk layer, then one per drafting stage."""

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    sliding_window: int
    compress_ratios: tuple[int, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    bos_token_id: int = 0
    eos_token_id: int = 1
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 0
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int = 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str) -> ModelConfig:
        """Reads a parsed config.json. `origin` names the file in errors.

        Raises UnsupportedModel for another architecture, and CorruptFile for a key that is missing, of the wrong type or
        contradicts another.
        """
        _check_architecture(data, origin)
        values = {}
        for field in fields(cls):
            if field.name in data:
                values[field.name] = _value(field.name, str(field.type), data[field.name], origin)
            elif field.default is MISSING:
                raise CorruptFile(
                    f"{origin} has no {field.name}.", "Use the config.json that belongs to the checkpoint."
                )
        config = cls(**values)
        config._check(origin)
        return config

    def ratio(self, layer: int) -> int:
        """Tokens per compressed entry of a trunk layer or stage: 0 (window only), 4 or 128."""
        return self.compress_ratios[layer]

    def is_hash(self, layer: int) -> bool:
        """Whether the token id alone chooses this trunk layer's experts."""
        return layer < self.num_hash_layers

    @property
    def stages(self) -> int:
        """Drafting stages (MTP or DSpark). `num_nextn_predict_layers` says 1 even where three are stored."""
        return len(self.compress_ratios) - self.num_hidden_layers

    def _check(self, origin: str) -> None:
        hint = "Use the config.json that belongs to the checkpoint."
        for field in fields(self):
            value = getattr(self, field.name)
            if str(field.type) in ("int", "float") and value < 0:
                raise CorruptFile(f"{origin}: {field.name} is {value}.", hint)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "o_groups",
                     "n_routed_experts", "num_experts_per_tok", "hc_mult", "sliding_window"):  # fmt: skip
            if getattr(self, name) < 1:
                raise CorruptFile(f"{origin}: {name} is {getattr(self, name)}.", hint)
        if self.stages < 0:
            raise CorruptFile(
                f"{origin}: compress_ratios has {len(self.compress_ratios)} entries for {self.num_hidden_layers} layers.",
                hint,
            )
        odd = [ratio for ratio in self.compress_ratios if ratio not in RATIOS]
        if odd:
            raise CorruptFile(f"{origin}: compress_ratios has {odd[0]}; only {RATIOS} are known.", hint)
        if self.num_attention_heads % self.o_groups:
            raise CorruptFile(f"{origin}: {self.num_attention_heads} heads do not make {self.o_groups} o_groups.", hint)
        if self.num_experts_per_tok > self.n_routed_experts:
            raise CorruptFile(
                f"{origin}: {self.num_experts_per_tok} of {self.n_routed_experts} experts per token.", hint
            )
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > min(self.head_dim, self.index_head_dim):
            raise CorruptFile(f"{origin}: qk_rope_head_dim is {self.qk_rope_head_dim}.", hint)


def _check_architecture(data: Mapping[str, Any], origin: str) -> None:
    found = data.get("model_type")
    name = (data.get("architectures") or [found])[0] if isinstance(data.get("architectures"), list) else found
    if found == MODEL_TYPE:
        return
    if str(found).startswith("deepseek_v41"):
        raise UnsupportedModel(
            f"{origin} is a DeepSeek-V4.1 model ({name}), which is not supported yet.",
            "V4.1 is a different architecture; use a DeepSeek-V4 checkpoint (Flash, Pro, 0731, 0813).",
        )
    raise UnsupportedModel(
        f"{origin} is a {name or 'model without a model_type'}, not DeepSeek-V4.", "dsv4 runs DeepSeek-V4 only."
    )


def _value(name: str, kind: str, value: Any, origin: str) -> Any:
    """A JSON value as the field's type."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" and numeric and int(value) == value:
        return int(value)
    if kind == "float" and numeric:
        return float(value)
    if kind == "tuple[int, ...]" and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "RopeScaling" and isinstance(value, Mapping):
        parts = {}
        for field in fields(RopeScaling):
            if field.name not in value:
                raise CorruptFile(f"{origin}: rope_scaling has no {field.name}.", "V4 needs YaRN's four numbers.")
            parts[field.name] = _value(f"rope_scaling.{field.name}", str(field.type), value[field.name], origin)
        return RopeScaling(**parts)
    raise CorruptFile(
        f"{origin}: {name} is {value!r}, not {kind}.", "Use the config.json that belongs to the checkpoint."
    )
