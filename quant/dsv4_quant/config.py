"""The configuration of a DeepSeek-V4 model, under the names of the official config.json (spec/checkpoint.md section 1.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from dsv4_quant.errors import CorruptFile, UnsupportedModel

MODEL_TYPE = "deepseek_v4"
RATIOS = (0, 4, 128)  # window only, overlapping groups with an indexer, long groups
ROW_BLOCK = 32  # matrices are stored in blocks of 32 along their rows
HINT = "Use the config.json that belongs to the checkpoint."

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "tuple[int, ...]": "a list of whole numbers",
    "RopeScaling": "an object",
}

# Keys that all DeepSeek-V4 models share: what computes another function must not run as if it did not.
CONSTANTS: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
# The smallest and largest sensible value, for everything that loops, lists of tensors or allocations grow with.
LIMITS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (ROW_BLOCK, 1 << 20),
    "moe_intermediate_size": (ROW_BLOCK, 1 << 20),
    "num_hidden_layers": (1, 1024),
    "num_hash_layers": (0, 1024),
    "num_attention_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 14),
    "qk_rope_head_dim": (2, 1 << 14),
    "q_lora_rank": (1, 1 << 20),
    "o_groups": (1, 1 << 14),
    "o_lora_rank": (1, 1 << 20),
    "n_routed_experts": (1, 1 << 14),
    "num_experts_per_tok": (1, 1 << 14),
    "sliding_window": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 31),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 1000),
    "index_n_heads": (1, 1 << 14),
    "index_head_dim": (2, 1 << 14),
    "index_topk": (1, 1 << 24),
}


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
        for name, value in CONSTANTS.items():
            if data.get(name, value) != value:
                raise UnsupportedModel(
                    f"{origin}: {name} is {data[name]!r}, not {value!r}.", "dsv4 runs DeepSeek-V4 only."
                )
        values = {}
        for field in fields(cls):
            if field.name in data:
                values[field.name] = _value(field.name, str(field.type), data[field.name], origin)
            elif field.default is MISSING:
                raise CorruptFile(f"{origin} has no {field.name}.", HINT)
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
        """Raises CorruptFile for values that no model can have or that contradict each other."""
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise CorruptFile(f"{origin}: {name} is {getattr(self, name)}; {least} to {most} can be.", HINT)
        problem = next(self._contradictions(), None)
        if problem is not None:
            raise CorruptFile(f"{origin}: {problem}.", HINT)

    def _contradictions(self) -> Iterator[str]:
        for field in fields(self):
            if str(field.type) in ("int", "float") and getattr(self, field.name) < 0:
                yield f"{field.name} is {getattr(self, field.name)}"
        if self.stages < 0:
            yield f"compress_ratios has {len(self.compress_ratios)} entries for {self.num_hidden_layers} layers"
        for ratio in self.compress_ratios:
            if ratio not in RATIOS:
                yield f"compress_ratios has {ratio}; only {', '.join(map(str, RATIOS))} are known"
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % ROW_BLOCK:
                yield f"{name} is {getattr(self, name)}, not a multiple of {ROW_BLOCK}"
        if self.num_attention_heads % self.o_groups:
            yield f"{self.num_attention_heads} heads do not make {self.o_groups} o_groups"
        if self.num_experts_per_tok > self.n_routed_experts:
            yield f"a token takes {self.num_experts_per_tok} experts of {self.n_routed_experts}"
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > min(self.head_dim, self.index_head_dim):
            yield f"qk_rope_head_dim is {self.qk_rope_head_dim} in heads of {self.head_dim} and {self.index_head_dim}"
        if any(getattr(self.rope_scaling, field.name) <= 0 for field in fields(RopeScaling)):
            yield f"rope_scaling is {self.rope_scaling}"
        for name in ("rope_theta", "compress_rope_theta"):  # YaRN divides by its logarithm
            if getattr(self, name) <= 1:
                yield f"{name} is {getattr(self, name)}"
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                yield f"{name} is {getattr(self, name)} in a vocabulary of {self.vocab_size}"


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
    """A JSON value as the field's type. JSON also brings NaN, Infinity and integers of any length."""
    number = _number(value)
    if kind == "int" and number is not None and int(number) == number:
        return int(number)
    if kind == "float" and number is not None:
        return float(number)
    if kind == "tuple[int, ...]" and isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "RopeScaling" and isinstance(value, Mapping):
        parts = {}
        for field in fields(RopeScaling):
            if field.name not in value:
                raise CorruptFile(f"{origin}: rope_scaling has no {field.name}.", "V4 needs YaRN's four numbers.")
            parts[field.name] = _value(f"rope_scaling.{field.name}", str(field.type), value[field.name], origin)
        return RopeScaling(**parts)
    raise CorruptFile(f"{origin}: {name} is {value!r}, not {KINDS[kind]}.", HINT)


def _number(value: Any) -> int | float | None:
    """`value` if it is a finite number of ordinary size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e18 else None
