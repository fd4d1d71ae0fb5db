"""Weights of `tiny` as float32 masters: initial values, the router's hash table, rounded working copies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tools.tiny.rounding import round_fp4, round_fp8
from tools.tiny.shape import CONFIG, Spec, specs

NOT_TRAINED = ("gate.bias", "gate.tid2eid")  # the bias follows the loads, the table is drawn once


def initial(seed: int) -> dict[str, Tensor]:
    """Fresh masters by official name; float32, the hash table int64."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: _draw(spec, generator) for spec in specs()}


def _draw(spec: Spec, g: torch.Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.randn(*spec.shape, generator=g) * std

    name = spec.name
    if name.endswith("tid2eid"):
        return hash_table(spec.shape[0], spec.shape[1], g)
    if name.endswith(("norm.weight", "norm", "enorm.weight", "hnorm.weight")):
        return torch.ones(spec.shape)
    if name.endswith(("gate.bias", "attn_sink")):
        return torch.zeros(spec.shape)
    if "hc_" in name:
        return _draw_hc(name, normal)
    if name == "embed.weight":
        return normal(0.5)
    if name == "head.weight":
        return normal(0.02)
    if name.endswith("ape"):
        return normal(0.1)
    gain = 0.5 if name.endswith(("wo_b.weight", "w2.weight")) else 1.0
    return normal(gain / math.sqrt(spec.shape[-1]))


def _draw_hc(name: str, normal: object) -> Tensor:
    """Hyper-connections start near: read a mix of the streams, write to all, keep the streams apart."""
    assert callable(normal)
    if name.endswith("fn"):
        return normal(0.02)
    if name.endswith("scale"):
        return torch.ones_like(normal(1.0))
    base: Tensor = normal(0.5)
    base[:4] -= 1.1  # sigmoid(-1.1) is a quarter
    if base.numel() > 8:
        base[8:] = 0.1 * base[8:] + 4.0 * torch.eye(4).flatten()
    return base


def hash_table(vocab: int, k: int, g: torch.Generator) -> Tensor:
    """int64 [vocab, k]: k different experts per token id, every expert drawn equally often."""
    count = CONFIG["n_routed_experts"]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if k != 2:
        raise ValueError(f"The hash table is drawn in pairs, but {k} experts per token are asked for.")
    rows = torch.tensor(pairs).repeat(-(-vocab // len(pairs)), 1)
    return rows[torch.randperm(len(rows), generator=g)[:vocab]].contiguous()


def working(masters: dict[str, Tensor], *, rounded: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Leaves for one step: matrices in `dtype`, the rest float32; `rounded` puts every value on its stored grid.

    FP8 and FP4 values times a power of two are exact in bfloat16, so the rounded copies are the stored weights.
    """
    out = {}
    for spec in specs():
        value = masters[spec.name]
        if spec.kind == "i64":
            out[spec.name] = value
            continue
        matrix = value.ndim == 2 and spec.kind != "f32"
        if rounded:
            value = _on_grid(spec, value)
        keep = spec.name == "embed.weight" or not matrix
        out[spec.name] = value.detach().to(torch.float32 if keep else dtype, copy=True)
        out[spec.name].requires_grad_(not spec.name.endswith(NOT_TRAINED))
    return out


def _on_grid(spec: Spec, value: Tensor) -> Tensor:
    if spec.kind == "fp8":
        return round_fp8(value)
    if spec.kind == "fp4":
        return round_fp4(value)
    return value.to(torch.bfloat16).float() if spec.kind == "bf16" else value
