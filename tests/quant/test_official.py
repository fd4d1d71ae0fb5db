"""The official layout: every weight as it was meant, from one shard or many, without copying a byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from tests.quant.conftest import SMALL
from tests.support.synth import FP4_VALUES, Checkpoint

TO_HUGGING_FACE = (  # official -> the spelling that the official converter takes as well
    ("attn.wq_a.", "self_attn.q_a_proj."), ("attn.wq_b.", "self_attn.q_b_proj."),
    ("attn.q_norm.", "self_attn.q_a_layernorm."), (".scale", ".weight_scale_inv"),
    ("gate.bias", "gate.e_score_correction_bias"), ("ffn.", "mlp."), ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."), ("embed.", "embed_tokens."), ("head.weight", "lm_head.weight"),
    (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."),
)  # fmt: skip


def meaning(checkpoint: Checkpoint, name: str) -> Tensor:
    """float32 of an official weight, by the formulas of spec/checkpoint.md section 2.2."""
    data = checkpoint.official[name]
    if name.removesuffix("weight") + "scale" not in checkpoint.official:
        return data.float()
    scale = checkpoint.official[name.removesuffix("weight") + "scale"].float()
    if data.dtype == torch.int8:
        codes = data.view(torch.uint8).long()
        values = torch.stack([FP4_VALUES[codes % 16], FP4_VALUES[codes // 16]], dim=-1).flatten(1)
        return values * scale.repeat_interleave(32, 1)
    rows, columns = data.shape
    return data.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def check_all(checkpoint: Checkpoint, folder: Path) -> None:
    source = open_source(folder)
    names = [name for name in checkpoint.official if not name.endswith(".scale")]
    for name in names:
        packed = source.read(name)
        expected = meaning(checkpoint, name)
        assert packed.shape == expected.shape, name
        assert torch.equal(packed.float(), expected), name
    assert source.tensor_bytes == sum(tensor.nbytes for tensor in checkpoint.official.values())
    assert sum(source.read(name).nbytes for name in names) == source.tensor_bytes


@pytest.mark.parametrize("shards", [1, 2, 66])
@pytest.mark.parametrize("base", [False, True], ids=["chat", "base"])
def test_every_weight_means_what_was_stored(base: bool, shards: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(replace(SMALL, base=base, shards=shards), seed=4)
    check_all(checkpoint, checkpoint.write(tmp_path))
    experts = {
        "layers.1.ffn.experts.2.w2.weight": "fp8_e4m3" if base else "fp4",
        "layers.1.attn.wkv.weight": "fp8_e4m3",
    }
    source = open_source(tmp_path)
    for name, fmt in experts.items():
        packed = source.read(name)
        assert packed.format == fmt
        assert packed.scale is not None
        assert packed.scale.dtype == (torch.float32 if base else torch.float8_e8m0fnu)


def test_without_an_index(small: Checkpoint, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    names = list(small.official)
    save_file({name: small.official[name] for name in names[:100]}, tmp_path / "a.safetensors")
    save_file({name: small.official[name] for name in names[100:]}, tmp_path / "b.safetensors")
    check_all(small, tmp_path)
    for file in ("a", "b"):
        (tmp_path / f"{file}.safetensors").unlink()
    save_file(small.official, tmp_path / "model.safetensors")
    check_all(small, tmp_path)


def test_names_of_the_hugging_face_kind(small: Checkpoint, folder: Path, tmp_path: Path) -> None:
    def theirs(name: str) -> str:
        for ours, other in TO_HUGGING_FACE:
            name = name.replace(ours, other)
        return "model." + name

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({theirs(name): tensor for name, tensor in small.official.items()}, tmp_path / "model.safetensors")
    check_all(small, tmp_path)


def test_scales_as_plain_bytes(small: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """Older libraries have no E8M0 and write its bytes as U8."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = {n: t.view(torch.uint8) if t.dtype == torch.float8_e8m0fnu else t for n, t in small.official.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    check_all(small, tmp_path)


def test_what_nobody_needs_is_ignored(small: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """Vision-Exp brings a tower, an unused router bias in hash layers and a second bias; config.json has keys of its own."""
    config = json.loads((folder / "config.json").read_text()) | {"vision_n_layers": 2, "vision_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    extra = {
        "vision.blocks.0.attn.wqkv.weight": torch.ones(4, 4), "aligner.w1.weight": torch.ones(2), "image_start": torch.ones(8),
        "layers.0.ffn.gate.bias": torch.ones(3), "layers.1.ffn.gate.bias_vl": torch.ones(3), "mtp.0.other.weight": torch.ones(1),
    }  # fmt: skip
    save_file(small.official | extra, tmp_path / "model.safetensors")
    header = read_header(tmp_path)
    assert set(header.unexpected) == {"layers.0.ffn.gate.bias", "layers.1.ffn.gate.bias_vl", "mtp.0.other.weight"}
    source = open_source(tmp_path)
    assert source.read("layers.1.ffn.gate.bias").shape == (3,)


def test_nothing_is_copied(folder: Path) -> None:
    """All tensors of a shard lie in one mapping, whose pages are the file's."""
    source = open_source(folder)
    a, b = source.read("embed.weight").data, source.read("layers.2.ffn.experts.1.w2.weight").data
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a.untyped_storage().nbytes() == next(folder.glob("*.safetensors")).stat().st_size
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [
            line for line in maps.read_text().splitlines() if line.endswith(".safetensors") and str(folder) in line
        ]
        assert len(lines) == 1
        assert lines[0].split()[1] == "r--s"


def test_weights_outlive_the_source(small: Checkpoint, folder: Path) -> None:
    source = open_source(folder)
    packed = source.read("embed.weight")
    source.close()
    del source
    assert torch.equal(packed.float(), small.official["embed.weight"].float())


def test_has_and_read_by_name(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.layout == "official"
    assert source.metadata == {}
    assert source.config.compress_ratios == (0, 4, 128, 0)
    assert source.raw_config["model_type"] == "deepseek_v4"
    assert source.has("layers.1.attn.indexer.wq_b.weight")
    assert not source.has("layers.2.attn.indexer.wq_b.weight")
    assert source.tokenizer() is None
    with pytest.raises(CorruptFile, match=r"no tensor layers\.2\.attn\.indexer\.wq_b\.weight"):
        source.read("layers.2.attn.indexer.wq_b.weight")


def test_safetensors_reads_the_same(folder: Path) -> None:
    """The format's own library as the judge of offsets and shapes."""
    header = read_header(folder)
    (shard,) = folder.glob("*.safetensors")
    theirs = load_file(shard)
    assert set(theirs) == set(header.tensors)
    raw = shard.read_bytes()
    for name, info in header.tensors.items():
        assert tuple(theirs[name].shape) == info.shape
        assert (
            theirs[name].contiguous().view(torch.uint8).numpy().tobytes()
            == raw[info.offset : info.offset + info.nbytes]
        )
