"""Every tensor that a DeepSeek-V4 checkpoint holds: shape, stored type, role, and its name in both worlds.

The official layout keeps each routed expert as tensors of its own, with a `.scale` beside every quantised `.weight`; a GGUF
stacks a layer's experts into one tensor and scales live inside its blocks. Both lists follow from the configuration
and a `Variant`; nothing is told apart by a repository's name (spec/checkpoint.md sections 2.3 to 2.5, 4.2 and 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile

Role = Literal[
    "embed",
    "head",
    "norm",
    "hc",
    "router",
    "attention",
    "compressor",
    "indexer",
    "shared_expert",
    "routed_expert",
    "mtp",
]
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I32": 4, "I64": 8}
TILE = 128  # FP8 scales: one per 128 x 128
ROW_BLOCK = 32  # FP4 scales: one per 32 in a row


@dataclass(frozen=True)
class Variant:
    """What a configuration leaves open: how experts and scales are stored, and which drafting stages there are."""

    expert_dtype: Literal["fp4", "fp8"] = "fp4"
    scale_dtype: Literal["F8_E8M0", "F32"] = "F8_E8M0"
    stages: Literal["none", "mtp", "dspark"] = "none"
    repeated_ends: bool = False  # Flash-Base stores the embedding and head again under mtp.0

    @classmethod
    def of(cls, found: Mapping[str, Found]) -> Variant:
        """Reads the variant off the tensors found, by official name."""
        expert, scale = found.get("layers.0.ffn.experts.0.w1.weight"), found.get("layers.0.attn.wq_a.scale")
        stages: Literal["none", "mtp", "dspark"] = "none"
        if "mtp.0.main_proj.weight" in found:
            stages = "dspark"
        elif "mtp.0.e_proj.weight" in found:
            stages = "mtp"
        return cls(
            expert_dtype="fp8" if expert is not None and expert.dtype == "F8_E4M3" else "fp4",
            scale_dtype="F32" if scale is not None and scale.dtype == "F32" else "F8_E8M0",
            stages=stages,
            repeated_ends="mtp.0.emb.tok_emb.weight" in found,
        )


class TensorSpec(NamedTuple):
    """One tensor of the official layout. `stage` counts drafting stages; `layer` is None outside the trunk."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    layer: int | None = None
    expert: int | None = None
    stage: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def tensors(config: ModelConfig, variant: Variant) -> Iterator[TensorSpec]:
    """The complete official list, in the order of the official shards."""
    c = config
    yield TensorSpec("embed.weight", (c.vocab_size, c.hidden_size), "BF16", "embed")
    for layer in range(c.num_hidden_layers):
        yield from _Block(c, variant, f"layers.{layer}.", layer, None).tensors(c.ratio(layer), c.is_hash(layer))
    yield from _stream_head("", c, None)
    yield TensorSpec("norm.weight", (c.hidden_size,), "BF16", "norm")
    yield TensorSpec("head.weight", (c.vocab_size, c.hidden_size), "BF16", "head")
    if variant.stages != "none":
        for stage in range(c.stages):
            yield from _stage(c, variant, stage)


def _stream_head(prefix: str, c: ModelConfig, stage: int | None) -> Iterator[TensorSpec]:
    role: Role = "hc" if stage is None else "mtp"
    for name, shape in (("fn", (c.hc_mult, c.hc_mult * c.hidden_size)), ("base", (c.hc_mult,)), ("scale", (1,))):
        yield TensorSpec(f"{prefix}hc_head_{name}", shape, "F32", role, stage=stage)


def _stage(c: ModelConfig, variant: Variant, stage: int) -> Iterator[TensorSpec]:
    """An MTP block, or one of the DSpark stages: a window-only block and what joins it to the trunk."""
    block = _Block(c, variant, f"mtp.{stage}.", None, stage)
    yield from block.tensors(0, by_hash=False)
    D, last = c.hidden_size, stage == c.stages - 1
    if variant.stages == "mtp":
        for name in ("e_proj", "h_proj"):
            yield from block.fp8(name, (D, D), "mtp")
        for name in ("enorm", "hnorm", "norm"):
            yield block.plain(f"{name}.weight", (D,), "BF16", "mtp")
        if variant.repeated_ends:
            for name in ("emb.tok_emb", "head"):
                yield block.plain(f"{name}.weight", (c.vocab_size, D), "BF16", "mtp")
    else:
        if stage == 0:
            yield from block.fp8("main_proj", (D, len(c.dspark_target_layer_ids) * D), "mtp")
            yield block.plain("main_norm.weight", (D,), "BF16", "mtp")
        if last:
            rank = c.dspark_markov_rank
            yield block.plain("norm.weight", (D,), "BF16", "mtp")
            for name in ("markov_w1", "markov_w2"):
                yield block.plain(f"markov_head.{name}.weight", (c.vocab_size, rank), "BF16", "mtp")
            yield block.plain("confidence_head.proj.weight", (1, D + rank), "BF16", "mtp")
    if variant.stages == "mtp" or last:
        yield from _stream_head(block.prefix, c, stage)


@dataclass(frozen=True)
class _Block:
    """Writes down the tensors of one block under its prefix."""

    c: ModelConfig
    variant: Variant
    prefix: str
    layer: int | None
    stage: int | None

    def plain(self, name: str, shape: tuple[int, ...], dtype: str, role: Role, expert: int | None = None) -> TensorSpec:
        role = role if self.stage is None else "mtp"
        return TensorSpec(self.prefix + name, shape, dtype, role, self.layer, expert, self.stage)

    def fp8(self, name: str, shape: tuple[int, int], role: Role, expert: int | None = None) -> Iterator[TensorSpec]:
        scales = (-(-shape[0] // TILE), -(-shape[1] // TILE))
        yield self.plain(name + ".weight", shape, "F8_E4M3", role, expert)
        yield self.plain(name + ".scale", scales, self.variant.scale_dtype, role, expert)

    def routed(self, name: str, shape: tuple[int, int], expert: int) -> Iterator[TensorSpec]:
        if self.variant.expert_dtype == "fp8":
            yield from self.fp8(name, shape, "routed_expert", expert)
            return
        rows, columns = shape
        yield self.plain(name + ".weight", (rows, columns // 2), "I8", "routed_expert", expert)
        yield self.plain(
            name + ".scale", (rows, columns // ROW_BLOCK), self.variant.scale_dtype, "routed_expert", expert
        )

    def tensors(self, ratio: int, by_hash: bool) -> Iterator[TensorSpec]:
        c = self.c
        mixes = (2 + c.hc_mult) * c.hc_mult
        for part in ("attn", "ffn"):
            yield self.plain(f"hc_{part}_fn", (mixes, c.hc_mult * c.hidden_size), "F32", "hc")
            yield self.plain(f"hc_{part}_base", (mixes,), "F32", "hc")
            yield self.plain(f"hc_{part}_scale", (3,), "F32", "hc")
            yield self.plain(f"{part}_norm.weight", (c.hidden_size,), "BF16", "norm")
        yield from self.attention(ratio)
        yield from self.experts(by_hash)

    def attention(self, ratio: int) -> Iterator[TensorSpec]:
        c, D = self.c, self.c.hidden_size
        width = c.num_attention_heads * c.head_dim
        yield self.plain("attn.attn_sink", (c.num_attention_heads,), "F32", "attention")
        yield from self.fp8("attn.wq_a", (c.q_lora_rank, D), "attention")
        yield self.plain("attn.q_norm.weight", (c.q_lora_rank,), "BF16", "norm")
        yield from self.fp8("attn.wq_b", (width, c.q_lora_rank), "attention")
        yield from self.fp8("attn.wkv", (c.head_dim, D), "attention")
        yield self.plain("attn.kv_norm.weight", (c.head_dim,), "BF16", "norm")
        yield from self.fp8("attn.wo_a", (c.o_groups * c.o_lora_rank, width // c.o_groups), "attention")
        yield from self.fp8("attn.wo_b", (D, c.o_groups * c.o_lora_rank), "attention")
        if ratio:
            yield from self.compressor("attn.compressor.", ratio, c.head_dim, "compressor")
        if ratio == 4:
            yield from self.fp8("attn.indexer.wq_b", (c.index_n_heads * c.index_head_dim, c.q_lora_rank), "indexer")
            yield self.plain("attn.indexer.weights_proj.weight", (c.index_n_heads, D), "BF16", "indexer")
            yield from self.compressor("attn.indexer.compressor.", ratio, c.index_head_dim, "indexer")

    def compressor(self, name: str, ratio: int, width: int, role: Role) -> Iterator[TensorSpec]:
        channels = 2 * width if ratio == 4 else width
        yield self.plain(name + "ape", (ratio, channels), "F32", role)
        yield self.plain(name + "wkv.weight", (channels, self.c.hidden_size), "BF16", role)
        yield self.plain(name + "wgate.weight", (channels, self.c.hidden_size), "BF16", role)
        yield self.plain(name + "norm.weight", (width,), "BF16", role)

    def experts(self, by_hash: bool) -> Iterator[TensorSpec]:
        c, D, width = self.c, self.c.hidden_size, self.c.moe_intermediate_size
        yield self.plain("ffn.gate.weight", (c.n_routed_experts, D), "BF16", "router")
        if by_hash:
            yield self.plain("ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "I64", "router")
        else:
            yield self.plain("ffn.gate.bias", (c.n_routed_experts,), "F32", "router")
        for name, shape in (("w1", (width, D)), ("w2", (D, width)), ("w3", (width, D))):
            yield from self.fp8(f"ffn.shared_experts.{name}", shape, "shared_expert")
            for expert in range(c.n_routed_experts):
                yield from self.routed(f"ffn.experts.{expert}.{name}", shape, expert)


# ---- GGUF names ----------------------------------------------------------------------------------------------------

GGUF_ROOT = {
    "embed.weight": "token_embd.weight", "head.weight": "output.weight", "norm.weight": "output_norm.weight",
    "hc_head_fn": "output_hc_fn.weight", "hc_head_base": "output_hc_base.weight", "hc_head_scale": "output_hc_scale.weight",
}  # fmt: skip
GGUF_LAYER = {
    "attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
    **{f"hc_{part}_{name}": f"hc_{part}_{name}.weight" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
    "attn.attn_sink": "attn_sinks.weight", "attn.wq_a.weight": "attn_q_a.weight", "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight", "attn.wkv.weight": "attn_kv.weight", "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight", "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight", "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight", "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight", "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight", "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight", "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight", "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
}  # fmt: skip
GGUF_EXPERTS = {"w1": "ffn_gate_exps.weight", "w3": "ffn_up_exps.weight", "w2": "ffn_down_exps.weight"}


class GgufSpec(NamedTuple):
    """One tensor of a GGUF: shape outermost first (GGUF itself counts from the innermost), and the official tensors in it."""

    name: str
    shape: tuple[int, ...]
    role: Role
    official: tuple[str, ...]


def gguf_name(official: str) -> tuple[str, int | None]:
    """The GGUF tensor that holds an official trunk weight, and which expert of a stack it is.

    Raises KeyError or ValueError for anything else.
    """
    if official in GGUF_ROOT:
        return GGUF_ROOT[official], None
    root, layer, leaf = official.split(".", 2)
    if root != "layers":  # drafting stages have leaves of the same names
        raise KeyError(official)
    if leaf.startswith("ffn.experts."):
        _, _, expert, matrix, _ = leaf.split(".")
        return f"blk.{layer}.{GGUF_EXPERTS[matrix]}", int(expert)
    return f"blk.{layer}.{GGUF_LAYER[leaf]}", None


def gguf_tensors(config: ModelConfig) -> Iterator[GgufSpec]:
    """The trunk as a GGUF lists it; the experts of a stack follow each other in the official list as well."""
    weights = (spec for spec in tensors(config, Variant()) if not spec.name.endswith(".scale"))
    for name, stack in groupby(weights, key=lambda spec: gguf_name(spec.name)[0]):
        specs = list(stack)
        first = specs[0]
        shape = (first.shape[0], 2 * first.shape[1]) if first.dtype == "I8" else first.shape
        stacked = first.expert is not None
        yield GgufSpec(name, (len(specs), *shape) if stacked else shape, first.role, tuple(s.name for s in specs))


# ---- names as found, and the check ---------------------------------------------------------------------------------

IGNORED_PREFIXES = ("vision.", "aligner.", "image_")
RENAMES = (
    ("self_attn.", "attn."), ("mlp.", "ffn."), ("weight_scale_inv", "scale"), ("e_score_correction_bias", "bias"),
    ("embed_tokens.", "embed."), ("lm_head.", "head."), ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."), ("q_a_proj.", "wq_a."), ("q_a_layernorm.", "q_norm."), ("q_b_proj.", "wq_b."),
    ("gate_proj.", "w1."), ("down_proj.", "w2."), ("up_proj.", "w3."),
)  # fmt: skip


def normalise(name: str) -> str:
    """An official name from the spelling that the official converter accepts as well (spec/checkpoint.md section 2.6)."""
    name = name.removeprefix("model.")
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    return name


class Found(Protocol):
    """What the check has to know of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def check_official(found: Mapping[str, Found], config: ModelConfig, origin: str) -> list[str]:
    """Compares a checkpoint with its configuration; returns names that nobody expects (they are ignored).

    Raises CorruptFile for a tensor that is missing, of another shape, or of a type that cannot stand there. Vision tensors,
    a router bias in hash layers and drafting stages that the configuration does not list are tolerated.
    """
    expected = set()
    for spec in tensors(config, Variant.of(found)):  # stops at the first that is missing, however many a hostile config asks for
        _compare(spec.name, spec.shape, stored_as(spec), found, origin)
        expected.add(spec.name)
    return [name for name in found if name not in expected and not name.startswith(IGNORED_PREFIXES)]


def check_gguf(found: Mapping[str, Found], config: ModelConfig, origin: str) -> list[str]:
    """As `check_official`, for a GGUF's names and shapes. Any of its number formats may stand anywhere."""
    expected = set()
    for spec in gguf_tensors(config):
        _compare(spec.name, spec.shape, TABLE_TYPES if spec.official[0].endswith("tid2eid") else (), found, origin)
        expected.add(spec.name)
    return [name for name in found if name not in expected]


PLAIN_TYPES = ("BF16", "F32", "F16")
TABLE_TYPES = ("I64", "I32", "i32", "i64")  # official, and a GGUF's


def stored_as(spec: TensorSpec) -> tuple[str, ...]:
    """The types that may stand where the official checkpoints have `spec.dtype`: other plain ones, other scales."""
    if spec.name.endswith(".scale"):
        return ("F8_E8M0", "F32", "U8")  # U8: E8M0 bytes written by a library that did not know the type yet
    if spec.dtype in PLAIN_TYPES:
        return PLAIN_TYPES
    return TABLE_TYPES if spec.dtype == "I64" else (spec.dtype,)


def _compare(
    name: str, shape: tuple[int, ...], types: tuple[str, ...], found: Mapping[str, Found], origin: str
) -> None:
    """Raises CorruptFile unless `name` is there, in `shape` and one of `types` (none given: any)."""
    hint = "The file does not belong to its configuration, or is incomplete; get it again."
    if name not in found:
        raise CorruptFile(f"{origin} has no tensor {name}.", hint)
    tensor = found[name]
    if tuple(tensor.shape) != shape:
        raise CorruptFile(f"{origin}: {name} has shape {list(tensor.shape)}; {list(shape)} is needed.", hint)
    if types and tensor.dtype not in types:
        raise CorruptFile(f"{origin}: {name} is stored as {tensor.dtype}; {types[0]} is needed.", hint)
