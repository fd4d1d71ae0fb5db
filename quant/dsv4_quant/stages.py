"""The drafting stages as llama.cpp expects them: a GGUF of their own, with names of their own (spec/checkpoint.md 5.3, 5.4).

An MTP block is one more layer behind the trunk, and its file brings the trunk's embedding and head. DSpark's stages are
a model of three layers, "dflash", which takes embedding and head from the model that it drafts for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import UnsupportedModel
from dsv4_quant.schema import GgufSpec, TensorSpec, Variant

MTP_ROOT = {"embed.weight": "token_embd.weight", "head.weight": "output.weight", "norm.weight": "output_norm.weight"}
MTP = {
    "enorm.weight": "nextn.enorm.weight", "hnorm.weight": "nextn.hnorm.weight", "norm.weight": "nextn.shared_head_norm.weight",
}  # fmt: skip
DSPARK = {
    "main_proj.weight": "fc.weight", "main_norm.weight": "enc.output_norm.weight", "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight", "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
}  # fmt: skip
HEADS = {f"hc_head_{name}": f"output_hc_{name}.weight" for name in ("fn", "base", "scale")}


def stage_tensors(config: ModelConfig, variant: Variant, origin: str) -> Iterator[GgufSpec]:
    """The tensors of the drafting GGUF that `variant.stages` asks for.

    `nextn.eh_proj` holds two official matrices side by side; everything else is one, or a stack of experts. Raises
    UnsupportedModel where the checkpoint has no such stages, or more MTP blocks than llama.cpp knows.
    """
    if variant.stages == "none" or not config.stages:
        raise UnsupportedModel(
            f"{origin} has no drafting stages.", "The preview releases have --mtp, those with DSpark have --dspark."
        )
    if variant.stages == "mtp" and config.stages > 1:
        raise UnsupportedModel(f"{origin} has {config.stages} MTP blocks.", "llama.cpp loads one.")
    found = {spec.name: spec for spec in schema.tensors(config, variant) if not spec.name.endswith(".scale")}
    if variant.stages == "mtp":
        for official, name in MTP_ROOT.items():
            yield GgufSpec(name, found[official].shape, found[official].role, (official,))
        projection = found["mtp.0.e_proj.weight"]
        rows, columns = projection.shape
        name = f"blk.{config.num_hidden_layers}.nextn.eh_proj.weight"
        yield GgufSpec(name, (rows, 2 * columns), "mtp", (projection.name, "mtp.0.h_proj.weight"))
    names = ((_name(spec, config, variant), spec) for spec in found.values() if spec.stage is not None)
    for name, stack in groupby(((name, spec) for name, spec in names if name), key=lambda pair: pair[0] or ""):
        yield _joined(name, [spec for _, spec in stack])


def _joined(name: str, specs: list[TensorSpec]) -> GgufSpec:
    first = specs[0]
    shape = (first.shape[0], 2 * first.shape[1]) if first.dtype == "I8" else first.shape
    if first.expert is not None:
        shape = (len(specs), *shape)
    return GgufSpec(name, shape, "mtp", tuple(spec.name for spec in specs))


def _name(spec: TensorSpec, config: ModelConfig, variant: Variant) -> str | None:
    """The GGUF's name of a stage's tensor; None for what the file does without, or has from elsewhere."""
    leaf = spec.name.split(".", 2)[2]
    assert spec.stage is not None
    block = spec.stage + (config.num_hidden_layers if variant.stages == "mtp" else 0)
    if spec.expert is not None:
        return f"blk.{block}.{schema.GGUF_EXPERTS[leaf.split('.')[3]]}"
    if leaf in schema.GGUF_LAYER:
        return f"blk.{block}.{schema.GGUF_LAYER[leaf]}"
    if leaf in HEADS:
        return HEADS[leaf]
    if variant.stages == "dspark":
        return DSPARK[leaf]
    return f"blk.{block}.{MTP[leaf]}" if leaf in MTP else None
