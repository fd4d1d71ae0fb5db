"""A release at its real size: 48 shards, 72,317 tensors, 167 GB. The files are holes behind real headers and take no disk."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4_quant import schema
from dsv4_quant.config import ModelConfig
from dsv4_quant.files import open_source
from dsv4_quant.schema import TensorSpec, Variant
from tests.quant.releases import FLASH_0731


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Flash-0731: the embedding, a shard per layer, the ends, and a shard per DSpark stage."""
    folder = tmp_path_factory.mktemp("flash")
    (folder / "config.json").write_text(json.dumps(FLASH_0731))
    config = ModelConfig.from_dict(FLASH_0731, "config.json")
    shards: defaultdict[str, list[TensorSpec]] = defaultdict(list)
    for spec in schema.tensors(config, Variant(stages="dspark")):
        start = spec.name.split(".")[0]
        shards[f"{start}{spec.layer if spec.stage is None else spec.stage}"].append(spec)
    ends = [key for key in shards if key.startswith(("norm", "hc_head", "head"))]
    merged = [specs for key, specs in shards.items() if key not in ends] + [
        [spec for key in ends for spec in shards[key]]
    ]
    index = {}
    for number, specs in enumerate(merged, 1):
        file = f"model-{number:05d}-of-{len(merged):05d}.safetensors"
        write_hole(folder / file, specs)
        index |= {spec.name: file for spec in specs}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    yield folder
    shutil.rmtree(folder)  # pytest keeps its folders for a while; nobody should copy this one


def write_hole(path: Path, specs: list[TensorSpec]) -> None:
    header, end = {}, 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_flash_opens_whatever_memory_there_is(flash: Path) -> None:
    source = open_source(flash)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(list(flash.glob("*.safetensors"))) == 48
    assert source.tensor_bytes == 166_878_536_440
    assert source.config.stages == 3
    for layer in range(43):
        expert = source.read(f"layers.{layer}.ffn.experts.255.w2.weight")
        assert (expert.format, expert.shape, expert.nbytes) == ("fp4", (4096, 2048), 4_456_448)
        assert expert.rows(slice(0, 1)).shape == (1, 2048)
    assert source.read("embed.weight").shape == (129280, 4096)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100_000_000
