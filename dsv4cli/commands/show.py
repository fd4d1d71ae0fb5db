"""`dsv4 show`: what a model is, read from its headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model
from dsv4cli.registry import catalog

if TYPE_CHECKING:
    from dsv4_quant.config import ModelConfig
    from dsv4_quant.files.headers import Header
    from dsv4cli.registry.catalog import Entry

ROLES = ("embed", "head", "norm", "hc", "attention", "compressor", "indexer", "router", "shared_expert",
         "routed_expert", "mtp")
STORED = {"I8": "FP4", "F8_E4M3": "FP8", "F8_E8M0": "E8M0 scales"}  # what the stored types of official files hold


class Part(NamedTuple):
    """All tensors of one role."""

    role: str
    tensors: int
    nbytes: int
    formats: str  # "FP8 96 %, BF16 4 %": by bytes


def show(model: Model, json: Json = False) -> None:
    """Show a model: architecture, tensors by role, context, license."""
    entry = catalog.resolve(model)
    facts = about(entry)
    if entry.path is None:
        _print(facts, {}, [], json)
        return
    from dsv4_quant.files.headers import read_header

    header = read_header(entry.path)
    _print({**facts, "layout": header.layout}, architecture(header.config), parts(header), json)


def about(entry: Entry) -> dict[str, Any]:
    """Names and origins; of a model that is not on this machine, what is published about it."""
    size: dict[str, Any] = {}
    if entry.path is None:
        size = {"bytes": entry.nbytes or None, "tensors": entry.tensors or None, "shards": entry.shards or None}
    return {"name": entry.name, "path": str(entry.path) if entry.path else None, "note": entry.note or None,
            "repo": entry.repo, "revision": entry.revision, "release": entry.release, "quant": entry.quant,
            "license": entry.license or _license(entry.path), **size}


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The numbers that people compare models by."""
    ratios = [config.ratio(layer) for layer in range(config.num_hidden_layers)]
    kinds = [f"{ratios.count(ratio)} {f'ratio {ratio}' if ratio else 'window only'}" for ratio in sorted(set(ratios))]
    heads = f"{config.num_attention_heads} heads of {config.head_dim} ({config.qk_rope_head_dim} rotated)"
    return {
        "layers": f"{config.num_hidden_layers} ({', '.join(kinds)}; {config.num_hash_layers} hash-routed)",
        "hidden": f"{config.hidden_size}, {config.hc_mult} streams",
        "attention": f"{heads}, window {config.sliding_window}",
        "indexer": f"{config.index_n_heads} heads of {config.index_head_dim}, top {config.index_topk}",
        "experts": f"{config.n_routed_experts} of width {config.moe_intermediate_size}, {config.num_experts_per_tok} "
                   f"active, {config.n_shared_experts} shared",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "longest context": f"{config.max_position_embeddings:,} tokens",
        "extra stages": f"{config.stages}",
    }


def parts(header: Header) -> list[Part]:
    """Tensors, bytes and formats by role."""
    groups = header.by_role()
    order = [*ROLES, *(role for role in groups if role not in ROLES)]
    return [Part(role, len(groups[role]), sum(tensor.nbytes for tensor in groups[role]), _formats(groups[role]))
            for role in order if role in groups]


def _formats(tensors: Iterable[Any]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        kind = STORED.get(tensor.dtype, tensor.dtype)
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    whole = sum(sizes.values()) or 1
    largest_first = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {100 * size / whole:.0f} %" for kind, size in largest_first)


def _license(path: Path | None) -> str | None:
    """The first line of the model's own license file."""
    if not path or not (file := path / "LICENSE").is_file():
        return None
    return file.read_text(encoding="utf-8", errors="replace").strip().split("\n")[0]


def _print(facts: dict[str, Any], numbers: dict[str, Any], groups: list[Part], json: bool) -> None:
    if json:
        console.print_json({**facts, "architecture": numbers or None, "parts": [part._asdict() for part in groups]})
        return
    if facts["path"] is None:
        facts = {**facts, "path": "not on this machine"}
    if facts.get("bytes"):
        facts["bytes"] = console.in_bytes(facts["bytes"])
    console.pairs([(name, str(value)) for name, value in {**facts, **numbers}.items() if value is not None])
    if groups:
        total = Part("total", sum(part.tensors for part in groups), sum(part.nbytes for part in groups), "")
        print()
        rows = [(part.role, f"{part.tensors:,}", console.in_bytes(part.nbytes), part.formats) for part in (*groups, total)]
        console.table(("ROLE", "TENSORS", "SIZE", "FORMATS"), rows, right=[1, 2])
