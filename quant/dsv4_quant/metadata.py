"""The keys of a GGUF that we write: what llama.cpp's converter writes, and what antirez/ds4 asks for beyond that.

spec/checkpoint.md sections 5.1 (keys), 5.3 (MTP), 5.4 (DSpark) and 5.5 (ds4). Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.gguf_keys import ARCHITECTURE
from dsv4_quant.files.gguf_writer import Entry
from dsv4_quant.files.headers import Header
from dsv4_quant.schema import GgufSpec, Variant

DSPARK_ARCHITECTURE = "dflash"
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PRE_TOKENIZER = "joyai-llm"  # llama.cpp's name for the pre-tokenizer that DeepSeek-V4 shares with JoyAI
SQRT_SOFTPLUS = 4
QUANTIZATION_VERSION = 2
HUB = "https://huggingface.co/"
QUALITY = "dsv4.quality"  # a text that is filled in after the file was measured
QUALITY_BYTES = 2048
# llama.cpp's number for a file whose routed experts mostly have this type.
FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k": 17, "q4_k": 15, "iq4_xs": 30, "mxfp4": 38, "q3_k": 12,
    "iq3_xxs": 23, "q2_k": 10, "iq2_xs": 20, "iq2_xxs": 19, "iq1_m": 31,
}  # fmt: skip
LARGEST_JSON = 1 << 28
# What is said behind "quantize.imatrix." where no importance was collected.
WEIGHT_ENERGY = {"file": "none", "dataset": "none: mean squares of the weights' own columns"}


@dataclass(frozen=True)
class Origin:
    """Where the weights come from, and what to say about them."""

    name: str
    repo: str | None = None
    revision: str | None = None
    license: str | None = None
    recipe: str = ""
    chat_template: str | None = None
    imatrix: Mapping[str, Any] = field(default_factory=dict)  # keys behind "quantize.imatrix."


def entries(header: Header, variant: Variant, specs: Sequence[GgufSpec], file_type: str, origin: Origin) -> list[Entry]:
    """All keys of the file that holds `specs`, in its order. `file_type` is the commonest type of its experts."""
    drafter = variant.stages == "dspark"
    found = [Entry("general.architecture", "str", DSPARK_ARCHITECTURE if drafter else ARCHITECTURE)]
    found += general(header, specs, file_type, origin)
    prefix = found[0].value
    for key, value in model_keys(header.config, variant).items():
        found.append(_guessed(f"{prefix}.{key}", value))
    found += tokenizer(header, origin.chat_template)
    if drafter:
        found.append(Entry("tokenizer.ggml.mask_token_id", "u32", header.config.dspark_noise_token_id))
    found += [_guessed(f"quantize.imatrix.{key}", value) for key, value in origin.imatrix.items()]
    found.append(Entry("dsv4.recipe", "str", origin.recipe))
    found.append(Entry(QUALITY, "str", " " * QUALITY_BYTES))
    return found


def general(header: Header, specs: Sequence[GgufSpec], file_type: str, origin: Origin) -> Iterator[Entry]:
    """The keys "general." but for the architecture. What a source GGUF says about its own origin is handed on."""
    yield Entry("general.type", "str", "model")
    yield Entry("general.name", "str", origin.name)
    yield Entry("general.size_label", "str", size_label(specs))
    yield Entry("general.file_type", "u32", FILE_TYPES[file_type])
    yield Entry("general.quantization_version", "u32", QUANTIZATION_VERSION)
    if terms := origin.license or header.metadata.get("general.license"):
        yield Entry("general.license", "str", terms.lower())
    if origin.repo:
        yield from _base_model(origin.name, origin.repo, origin.revision)
    else:
        kept = ("general.base_model.", "general.source.", "general.sampling.")
        yield from (_guessed(key, value) for key, value in header.metadata.items() if key.startswith(kept))
    if header.layout == "official":
        chosen = _json(header.path / "generation_config.json")
        for key, name in (("temperature", "temp"), ("top_p", "top_p")):
            if isinstance(chosen.get(key), (int, float)):
                yield Entry(f"general.sampling.{name}", "f32", float(chosen[key]))


def _base_model(name: str, repo: str, revision: str | None) -> Iterator[Entry]:
    url = HUB + repo
    yield Entry("general.source.repo_url", "str", url)
    if revision:
        yield Entry("general.source.url", "str", f"{url}/tree/{revision}")
    yield Entry("general.base_model.count", "u32", 1)
    yield Entry("general.base_model.0.name", "str", name)
    yield Entry("general.base_model.0.organization", "str", repo.partition("/")[0])
    yield Entry("general.base_model.0.repo_url", "str", url)
    if revision:
        yield Entry("general.base_model.0.version", "str", revision)


def size_label(specs: Iterable[GgufSpec]) -> str:
    """ "256x8.4B": how many experts, and the weights that remain if there were one a layer."""
    experts, single, shared = 0, 0, 0
    for spec in specs:
        weights = 1
        for size in spec.shape:
            weights *= size
        if len(spec.shape) == 3:
            experts = spec.shape[0]
            single += weights // experts
        else:
            shared += weights
    count = float(single + shared)
    for unit in "KMBT":
        count /= 1000
        if count < 999.5 or unit == "T":
            break
    return f"{experts}x{count:.{max(0, 2 - len(str(round(count))))}f}{unit}"


def model_keys(c: ModelConfig, variant: Variant) -> dict[str, Any]:
    """Keys behind the architecture's name: int is written as u32, float as f32, lists as arrays of i32 or f32."""
    blocks, ratios, hashed = c.num_hidden_layers, list(c.compress_ratios), c.num_hash_layers
    more: dict[str, Any] = {"embedding_length_out": c.hc_mult * c.hidden_size}
    if variant.stages == "mtp":
        blocks, more = blocks + c.stages, more | {"nextn_predict_layers": c.stages}
    elif variant.stages == "dspark":
        blocks, ratios, hashed = c.stages, [0] * c.stages, 0
        layers = [layer + 1 for layer in c.dspark_target_layer_ids]  # a model's output counts as its last layer
        more = {"block_size": c.dspark_block_size, "target_layers": layers}
    return {
        "block_count": blocks,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "vocab_size": c.vocab_size,
        **more,
        **_attention_keys(c, ratios),
        **_rope_keys(c),
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": True,
        "expert_gating_func": SQRT_SOFTPLUS,
        "swiglu_clamp_exp": [c.swiglu_limit] * blocks,
        "swiglu_clamp_shexp": [c.swiglu_limit] * blocks,
        "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": c.hc_eps,
        "hash_layer_count": hashed,
    }


def _attention_keys(c: ModelConfig, ratios: list[int]) -> dict[str, Any]:
    return {
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window,
        "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank,
        "attention.compress_ratios": ratios,
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk,
    }


def _rope_keys(c: ModelConfig) -> dict[str, Any]:
    return {
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": c.rope_theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": c.rope_scaling.factor,
        "rope.scaling.original_context_length": c.rope_scaling.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": c.rope_scaling.beta_fast,
        "rope.scaling.yarn_beta_slow": c.rope_scaling.beta_slow,
    }


def tokenizer(header: Header, chat_template: str | None) -> Iterator[Entry]:
    """The tokenizer of the source; a source without one gives the model "none", which runners accept."""
    template = chat_template or header.metadata.get("tokenizer.chat_template")
    if header.layout == "gguf":
        kept = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.")}
        kept.pop("tokenizer.chat_template", None)
        yield from (_guessed(key, value) for key, value in kept.items())
    elif (header.path / "tokenizer.json").is_file():
        yield from _from_json(header)
    else:
        yield Entry("tokenizer.ggml.model", "str", "none")
    if template:
        yield Entry("tokenizer.chat_template", "str", template)


def _from_json(header: Header) -> Iterator[Entry]:
    """The keys of a checkpoint's tokenizer.json and tokenizer_config.json."""
    path, size = header.path / "tokenizer.json", header.config.vocab_size
    data, chosen = _json(path), _json(header.path / "tokenizer_config.json")
    try:
        tokens, kinds = tokens_of(data, size)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    except (KeyError, TypeError, IndexError) as error:
        raise CorruptFile(f"{path} is no tokenizer for {size} tokens ({error!r}).", "Get the file again.") from None
    yield Entry("tokenizer.ggml.model", "str", "gpt2")
    yield Entry("tokenizer.ggml.pre", "str", PRE_TOKENIZER)
    yield Entry("tokenizer.ggml.tokens", "[str]", tokens)
    yield Entry("tokenizer.ggml.token_type", "[i32]", kinds)
    yield Entry("tokenizer.ggml.merges", "[str]", merges)
    eos = header.config.eos_token_id
    pad = chosen.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    yield Entry("tokenizer.ggml.bos_token_id", "u32", header.config.bos_token_id)
    yield Entry("tokenizer.ggml.eos_token_id", "u32", eos)
    yield Entry("tokenizer.ggml.padding_token_id", "u32", tokens.index(pad) if pad in tokens else eos)
    yield Entry("tokenizer.ggml.add_bos_token", "bool", bool(chosen.get("add_bos_token")))
    yield Entry("tokenizer.ggml.add_eos_token", "bool", bool(chosen.get("add_eos_token")))


def tokens_of(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Spelling and GGUF kind of every id of a tokenizer.json; ids that it does not use are padded."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for spelling, i in data["model"]["vocab"].items():
        tokens[i], kinds[i] = spelling, ORDINARY
    for token in data["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _guessed(key: str, value: Any) -> Entry:
    """An entry of the type that its Python value says."""
    if isinstance(value, list):
        kind = "i32" if not value else _kind(value[0])
        return Entry(key, f"[{'i32' if kind == 'u32' else kind}]", value)
    return Entry(key, _kind(value), value)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "u32" if 0 <= value < 1 << 32 else "i64"
    return "f32" if isinstance(value, float) else "str"


def _json(path: Path) -> dict[str, Any]:
    """A parsed file; empty where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_JSON:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} is not readable JSON: {error}.", "Get the file again.") from None
    return data if isinstance(data, dict) else {}
