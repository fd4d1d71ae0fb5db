"""A model of random weights without a file, made where it is wanted: full-size models can be timed where none was fetched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Generator, Tensor

from dsv4_quant.config import ModelConfig
from dsv4_quant.formats import FORMATS, Packed
from dsv4_quant.recipe import KEEP, Recipe, slot_of
from dsv4_quant.schema import TensorSpec, Variant, gguf_name, tensors
from tools.random_weights import packed

PLAIN = {"BF16": "bf16", "F32": "f32", "F8_E4M3": "fp8_e4m3", "I8": "fp4"}


@dataclass(frozen=True)
class RandomSource:
    """Answers to official names as an open checkpoint of that recipe would, with what the generator draws, on its device."""

    config: ModelConfig
    recipe: Recipe
    random: Generator
    path: Path = Path("random weights")

    def read(self, name: str) -> Packed:
        """Raises KeyError for a name that the configuration does not imply."""
        spec, device = self._specs[name], self.random.device
        if spec.dtype == "I64":  # of each token id, experts that differ
            ids = torch.arange(math.prod(spec.shape), device=device) % self.config.n_routed_experts
            return Packed("i64", spec.shape, ids.view(spec.shape))
        if len(spec.shape) == 2:
            return packed(self._format(spec), *_logical(spec), self.random)
        values = torch.randn(spec.shape, generator=self.random, device=device) * 0.1
        return Packed("f32", spec.shape, 1 + values if spec.name.endswith("norm.weight") else values)

    def maps(self) -> dict[Path, Tensor]:
        """No file: nothing can be cut short or written to."""
        return {}

    def sizes(self) -> dict[int | None, int]:
        """Bytes of each layer's matrices, which are almost everything; None: of what belongs to no layer."""
        found: dict[int | None, int] = {}
        for spec in self._specs.values():
            if len(spec.shape) == 2 and spec.dtype != "I64":
                kind = FORMATS[self._format(spec)]
                found[spec.layer] = found.get(spec.layer, 0) + math.prod(_logical(spec)) // kind.block * kind.block_bytes
        return found

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in tensors(self.config, Variant()) if not spec.name.endswith(".scale")}

    def _format(self, spec: TensorSpec) -> str:
        kind = self.recipe.type_of(slot_of(gguf_name(spec.name)[0]), spec.layer)
        return PLAIN[spec.dtype] if kind == KEEP else kind


def _logical(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a matrix; the official FP4 has two numbers in a byte."""
    rows, cols = spec.shape
    return rows, 2 * cols if spec.dtype == "I8" else cols
