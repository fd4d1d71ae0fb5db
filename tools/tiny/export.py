"""Write the trained masters as a checkpoint in the official layout.

    python -m tools.tiny.export RUN/masters.pt ASSET

ASSET (which already holds tokenizer.json) gets config.json, generation_config.json and model.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.tiny.rounding import fp4_codes, fp4_scales, fp8_scales, spread_tiles
from tools.tiny.shape import CONFIG, Spec, specs

GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": False,  # a world this small has one right answer to most questions
    "transformers_version": "4.46.3",
}


def stored(spec: Spec, value: Tensor) -> dict[str, Tensor]:
    """The tensors that one weight becomes in the file, by name: codes and, if quantised, their E8M0 scales."""
    scale_name = spec.name.removesuffix("weight") + "scale"
    if spec.kind == "fp8":
        scales = fp8_scales(value)
        codes = (value / spread_tiles(scales, value.shape)).to(torch.float8_e4m3fn)
        return {spec.name: codes, scale_name: scales.to(torch.float8_e8m0fnu)}
    if spec.kind == "fp4":
        scales = fp4_scales(value)
        codes = fp4_codes(value, scales).unflatten(-1, (-1, 2))
        packed = (codes[..., 0] | codes[..., 1] << 4).view(torch.int8)
        return {spec.name: packed, scale_name: scales.to(torch.float8_e8m0fnu)}
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[spec.kind]
    return {spec.name: value.to(dtype)}


def export(masters: dict[str, Tensor], folder: Path) -> int:
    """Write the checkpoint into the folder; returns the bytes of the whole folder."""
    tensors: dict[str, Tensor] = {}
    for spec in specs():
        parts = stored(spec, masters[spec.name].detach())
        tensors.update({name: part.contiguous().clone() for name, part in parts.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(f.stat().st_size for f in folder.iterdir())


if __name__ == "__main__":
    size = export(torch.load(sys.argv[1])["masters"], Path(sys.argv[2]))
    print(f"{size:,} bytes in {sys.argv[2]}")
