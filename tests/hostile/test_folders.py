"""Checkpoint folders whose configuration, index and shards do not belong together, or lead elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_quant.errors import CorruptFile, UnsupportedModel
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import LARGEST_JSON
from tests.hostile.conftest import FIRST, INDEX, SECOND, opens_or_is_refused, refused


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Makes one shard, without an index, of all tensors as `edit` leaves them."""
    tensors = load_file(folder / FIRST) | load_file(folder / SECOND)
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_valid_folder_opens(folder: Path) -> None:
    assert opens_or_is_refused(folder)
    (folder / INDEX).unlink()
    assert opens_or_is_refused(folder)


# ---- paths


def test_what_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path / "nul\0byte", "does not exist", named="nul")
    refused(tmp_path, "config.json does not exist")
    refused(tmp_path / ("x" * 5000), "cannot be read", named="xxx")


@pytest.mark.parametrize(
    "outside",
    ["../other.safetensors", "/etc/passwd", "sub/other.safetensors", "./" + FIRST, "..", ".", "", "/", FIRST + "/"],
)
def test_an_index_that_leaves_its_folder(outside: str, folder: Path) -> None:
    """Refused even where the file exists and would fit."""
    shutil.copy(folder / FIRST, folder.parent / "other.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"embed.weight": outside}))
    refused(folder, "outside its folder", named=INDEX)


def test_an_index_that_names_missing_shards(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"extra": "model-00003.safetensors"}))
    refused(folder, "lacks model-00003.safetensors of 3 shards")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"extra": "\0", "more": "\ud800"}))
    refused(folder, "and 1 more of 4 shards")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"extra": "x" * 5000}))
    refused(folder, "lacks xxx")


def test_shards_of_a_set_that_are_missing(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / FIRST).unlink()
    refused(folder, f"lacks {FIRST} of 2 shards")
    (folder / SECOND).rename(folder / "model-00002-of-99999.safetensors")
    refused(folder, "and 99997 more of 99999 shards")
    (folder / "model-00002-of-99999.safetensors").unlink()
    refused(folder, "has no .safetensors file")


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST])
def test_a_folder_in_the_place_of_a_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    if name == INDEX:  # read as if there were none
        assert opens_or_is_refused(folder)
    else:
        refused(folder, name, named=folder.name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("name", ["config.json", FIRST])
def test_a_pipe_in_the_place_of_a_file(name: str, folder: Path) -> None:
    """Must not be waited for."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, name, named=folder.name)
    os.mkfifo(folder.parent / "pipe.gguf")
    refused(folder.parent / "pipe.gguf", "does not exist")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind the superuser")
@pytest.mark.parametrize("name", ["config.json", FIRST])
def test_a_file_that_may_not_be_read(name: str, folder: Path) -> None:
    (folder / name).chmod(0)
    refused(folder, "cannot be read", named=name)


# ---- JSON


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 300_000, b'{"a": ' * 300_000,
     b'{"a": ' + b"1" * 5000 + b"}"],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_json_object(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    refused(folder, named=name)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_file_too_large_for_what_it_is(name: str, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(LARGEST_JSON + 1)
    refused(folder, f"{LARGEST_JSON + 1} bytes", named=name)


@pytest.mark.parametrize("weight_map", [None, [], {}, 3, "x", {"a": None}, {"a": 3}, {"a": ["b"]}, {"a": FIRST, "b": {}}])
def test_an_index_without_a_map(weight_map: Any, folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    refused(folder, "has no weight_map", named=INDEX)


# ---- tensors


def test_a_tensor_in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / SECOND)
    tensors["embed.weight"] = torch.zeros(1)
    save_file(tensors, folder / SECOND)
    refused(folder, "embed.weight", FIRST, SECOND, named="embed.weight")


def test_two_spellings_of_one_name(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": tensors["embed.weight"] + 1}))
    refused(folder, "embed.weight is in both", named="model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["embed.weight", "hc_head_scale", "layers.0.attn.wkv.scale", "layers.0.ffn.gate.tid2eid",
     "layers.0.attn.indexer.compressor.ape", "layers.1.ffn.gate.bias",
     "layers.1.ffn.experts.1.w2.weight", "layers.1.ffn.experts.0.w3.scale"],
)  # fmt: skip
def test_a_tensor_that_is_missing(name: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"has no tensor {name}")


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("embed.weight", torch.zeros(13, 32, dtype=torch.bfloat16), "[13, 32]; [12, 32]"),
        ("embed.weight", torch.zeros(32, 12, dtype=torch.bfloat16), "[32, 12]; [12, 32]"),
        ("embed.weight", torch.zeros(12, 32, dtype=torch.int8), "stored as I8"),
        ("norm.weight", torch.zeros(()), "[]; [32]"),
        ("norm.weight", torch.zeros(0), "[0]; [32]"),
        ("norm.weight", torch.zeros(32, dtype=torch.bool), "stored as BOOL"),
        ("layers.0.attn.wkv.weight", torch.zeros(64, 32), "stored as F32; F8_E4M3"),
        ("layers.0.attn.wkv.weight", torch.zeros(64, 32, dtype=torch.float8_e5m2), "stored as F8_E5M2"),
        ("layers.0.attn.wkv.scale", torch.zeros(64, 32), "[64, 32]; [1, 1]"),
        ("layers.0.attn.wkv.scale", torch.zeros(1, 1, dtype=torch.float16), "stored as F16; F8_E8M0"),
        ("layers.1.ffn.experts.1.w1.weight", torch.zeros(32, 32, dtype=torch.int8), "[32, 32]; [32, 16]"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(12, 2), "stored as F32; I64"),
        ("layers.0.ffn.gate.tid2eid", torch.zeros(11, 2, dtype=torch.int64), "[11, 2]; [12, 2]"),
    ],
    ids=range(13),
)
def test_a_tensor_of_another_kind(name: str, tensor: torch.Tensor, says: str, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    refused(folder, name, says)


def test_tensors_that_nobody_expects_can_be_of_any_kind(folder: Path) -> None:
    """They are ignored; whoever asks for one by name gets it, or is told why not."""
    odd = {
        "a": torch.zeros(()), "b": torch.zeros(0, 3),
        "c": torch.zeros(3, dtype=torch.bool), "d": torch.zeros(3, dtype=torch.uint32),
        "e.weight": torch.zeros(2, 2, dtype=torch.int8), "f.weight": torch.zeros(2, dtype=torch.float8_e5m2),
        "layers.0.ffn.experts.7.w1.weight": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    edit_tensors(folder, lambda tensors: tensors.update(odd))
    source = open_source(folder)
    assert source.read("a").float().shape == ()
    assert source.read("b").float().shape == (0, 3)
    for name in [*odd][2:]:
        with pytest.raises(CorruptFile, match=name.removesuffix("weight")):
            source.read(name)


# ---- config.json


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 64}, "shape"),
        ({"num_hidden_layers": 3, "compress_ratios": [4, 0, 0]}, "has no tensor layers.2."),
        ({"num_hidden_layers": 1024, "compress_ratios": [4] + [0] * 1023}, "has no tensor layers.2."),
        ({"num_hidden_layers": 1024, "compress_ratios": [4] * 1024, "n_routed_experts": 16384}, "gate.weight has shape"),
        ({"n_routed_experts": 16384}, "layers.0.ffn.gate.weight has shape"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000"),
        ({"hidden_size": 10**17}, "hidden_size is 100000000000000000"),
        ({"hc_mult": 10**6}, "hc_mult is 1000000"),
        ({"rope_theta": 1}, "rope_theta is 1.0"),
        ({"compress_rope_theta": 0}, "compress_rope_theta is 0.0"),
        ({"rope_scaling": {"factor": 16, "original_max_position_embeddings": 1, "beta_fast": 32, "beta_slow": 0}}, "beta_slow=0"),
        ({"bos_token_id": 12}, "bos_token_id is 12 in a vocabulary of 12"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000"),
        ({"num_hash_layers": 2}, "has no tensor layers.1.ffn.gate.tid2eid"),
    ],
    ids=range(15),
)
def test_a_configuration_that_is_not_the_files(change: dict[str, Any], says: str, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(change))
    refused(folder, says, named="model")


def test_millions_of_drafting_stages(folder: Path) -> None:
    """Surplus ratios stand for stages; without a tensor of any there are none, with one the next is missed at once."""
    edit_json(folder / "config.json", lambda config: config.update(compress_ratios=[4, 0] + [0] * 3_000_000))
    open_source(folder)
    edit_tensors(folder, lambda tensors: tensors.update({"mtp.0.e_proj.weight": torch.zeros(1)}))
    refused(folder, "has no tensor mtp.0.hc_attn_fn")


@pytest.mark.parametrize("model_type", ["deepseek_v41", "deepseek_v3", "llama", "", None, 4, [], {}])
def test_other_architectures(model_type: Any, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type=model_type, architectures=[None]))
    assert type(refused(folder, named="config.json")) is UnsupportedModel
