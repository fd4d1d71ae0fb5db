"""A GGUF answers to official names with what the official checkpoint holds, whoever wrote it and in however many parts."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from dsv4_quant import schema
from dsv4_quant.errors import CorruptFile, UnsupportedModel
from dsv4_quant.files import Source, gguf_header, open_source
from dsv4_quant.files.headers import read_header
from tests.support.gguf_writer import as_converted, as_ds4, ds4_keys, part_path, write

LOSSLESS = {"f32", "bf16", "mxfp4", "i32"}  # for FP8 and FP4 codes times powers of two, and for BF16


@pytest.fixture(scope="module")
def official(folder: Path) -> Source:
    return open_source(folder)


def trunk(source: Source) -> list[str]:
    return [name for spec in schema.gguf_tensors(source.config) for name in spec.official]


def check_all(found: Source, official: Source, tolerance: dict[str, float]) -> set[str]:
    """Compares every weight; `tolerance` is what a format may be off, relative to the largest value in its row."""
    formats = set()
    for name in trunk(official):
        packed, expected = found.read(name), official.read(name).float()
        formats.add(packed.format)
        assert packed.shape == expected.shape, name
        if packed.format in LOSSLESS:
            assert torch.equal(packed.float(), expected), name
        else:
            bound = expected.abs().amax(-1, keepdim=True) * tolerance[packed.format]
            assert ((packed.float() - expected).abs() <= bound).all(), name
    return formats


def test_as_llama_cpp_converts(official: Source, tmp_path: Path) -> None:
    found = open_source(write(official, tmp_path / "m.gguf", as_converted))
    assert found.layout == "gguf"
    assert check_all(found, official, {"q8_0": 0.6 / 127}) == {"f32", "bf16", "mxfp4", "q8_0", "i32"}
    assert found.read("layers.0.ffn.gate.tid2eid").data.dtype == torch.int32
    assert read_header(tmp_path / "m.gguf").unexpected == []


def test_as_ds4_writes(official: Source, tmp_path: Path) -> None:
    found = open_source(write(official, tmp_path / "m.gguf", as_ds4, change_keys=ds4_keys(official.config)))
    formats = check_all(found, official, {"q8_0": 0.6 / 127, "f16": 2.0**-11, "q4_0": 1 / 8})
    assert formats == {"f32", "f16", "q8_0", "q4_0", "i32"}
    assert found.read("layers.2.attn.compressor.ape").format == "f16"
    assert found.config == official.config


# What the gguf package can write; the other types are decoded in test_formats.py.
WRITABLE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4]


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_each_type_as_gguf_itself_reads_it(kind: Kind, official: Source, tmp_path: Path) -> None:
    path = write(official, tmp_path / "m.gguf", kind)
    found = open_source(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in (
        "layers.1.attn.wq_b.weight",
        "layers.1.ffn.experts.2.w2.weight",
        "layers.1.ffn.shared_experts.w3.weight",
    ):
        stored, expert = schema.gguf_name(name)
        values = gguf.dequantize(theirs[stored].data, theirs[stored].tensor_type)
        expected = values if expert is None else values[expert]
        assert np.array_equal(found.read(name).float().numpy(), expected), name


@pytest.mark.parametrize("parts", [2, 5])
def test_split_files(parts: int, official: Source, tmp_path: Path) -> None:
    first = write(official, tmp_path / "m.gguf", Kind.F32, parts=parts)
    assert first.name == f"m-00001-of-{parts:05d}.gguf"
    found = open_source(first)
    check_all(found, official, {})
    assert found.tensor_bytes == open_source(write(official, tmp_path / "one.gguf", Kind.F32)).tensor_bytes


def test_a_part_that_is_missing_or_wrong_is_named(official: Source, tmp_path: Path) -> None:
    first = write(official, tmp_path / "m.gguf", Kind.F32, parts=3)
    second, third = (part_path(tmp_path / "m.gguf", number, 3) for number in (1, 2))
    with pytest.raises(CorruptFile, match="is part of a model split into 3") as error:
        open_source(second)
    assert "00001-of-00003" in error.value.hint
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(CorruptFile, match=r"lacks m-00003-of-00003\.gguf of 3 parts"):
        open_source(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(CorruptFile, match=r"m-00003-of-00003\.gguf says it is part 1"):
        open_source(first)
    third.write_bytes(kept[: len(kept) - 64])
    with pytest.raises(CorruptFile, match="m-00003-of-00003"):
        open_source(first)


def test_experts_are_slices_of_one_stack(official: Source, tmp_path: Path) -> None:
    path = write(official, tmp_path / "m.gguf", Kind.Q8_0)
    found = open_source(path)
    one, two = (found.read(f"layers.1.ffn.experts.{expert}.w1.weight").data for expert in (0, 1))
    assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
    assert one.untyped_storage().nbytes() == path.stat().st_size
    assert two.data_ptr() - one.data_ptr() == one.nbytes


def test_configuration_from_keys(official: Source, tmp_path: Path) -> None:
    """One entry of compress_ratios per drafting stage is left, although no stage is in the file."""
    found = open_source(write(official, tmp_path / "m.gguf", Kind.BF16))
    assert found.config == official.config
    assert found.config.hc_eps == 1e-6  # not the float32 beside it
    assert found.metadata["deepseek4.block_count"] == 3


Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    "edit",
    [
        lambda keys: keys.update({"expert_feed_forward_length": [64, 64, 64]}),
        lambda keys: keys.update({"swiglu_clamp_exp": 10.0}),
        lambda keys: keys.update(
            {"swiglu_clamp_shexp": None, "embedding_length_out": None, "attention.value_length": None}
        ),
        lambda keys: keys.update({"rope.freq_base": None, "rope.dimension_count": None, "rope.scaling.type": None}),
        lambda keys: keys.update({"vocab_size": 64, "attention.head_count_kv": [1, 1, 1]}),
        lambda keys: keys.update({"nextn_predict_layers": 1}),  # promised, but no such tensors: counts as none
    ],
    ids=["width-array", "clamp-scalar", "optional-keys", "rope-keys", "vocab-size", "nextn"],
)
def test_keys_that_may_differ(edit: Edit, official: Source, tmp_path: Path) -> None:
    assert open_source(write(official, tmp_path / "m.gguf", Kind.F32, change_keys=edit)).config == official.config


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda keys: keys.update({"expert_count": None}), CorruptFile, "no key deepseek4.expert_count"),
        (lambda keys: keys.update({"attention.compress_ratios": [0, 4]}), CorruptFile, "2 entries for 3 layers"),
        (lambda keys: keys.update({"attention.compress_ratios": [0, 4, 64]}), CorruptFile, "has 64"),
        (lambda keys: keys.update({"attention.compress_ratios": 4}), CorruptFile, "compress_ratios is 4"),
        (lambda keys: keys.update({"expert_count": "many"}), CorruptFile, "n_routed_experts is 'many'"),
        (lambda keys: keys.update({"block_count": "x"}), CorruptFile, "num_hidden_layers is 'x'"),
        (lambda keys: keys.update({"block_count": 2**32 - 1}), CorruptFile, "num_hidden_layers is 4294967295"),
        (lambda keys: keys.update({"expert_count": 2**32 - 1}), CorruptFile, "n_routed_experts is 4294967295"),
        (lambda keys: keys.update({"embedding_length": 160}), CorruptFile, "token_embd.weight has shape"),
        (
            lambda keys: keys.update({"swiglu_clamp_exp": [10.0, 7.0, 10.0]}),
            UnsupportedModel,
            "10.0 in some layers and 7.0",
        ),
        (lambda keys: keys.update({"expert_gating_func": 2}), UnsupportedModel, "expert_gating_func is 2, not 4"),
        (lambda keys: keys.update({"expert_weights_norm": False}), UnsupportedModel, "expert_weights_norm is False"),
    ],
)
def test_keys_that_must_not(edit: Edit, error: type[Exception], says: str, official: Source, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        open_source(write(official, tmp_path / "m.gguf", Kind.F32, change_keys=edit))


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("deepseek41", "DeepSeek-V4.1 is not supported yet"),
        ("dflash", "DSpark stages"),
        ("llama", "DeepSeek-V4 only"),
    ],
)
def test_other_architectures_are_named(architecture: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=repr(architecture)) as error:
        open_source(_with_one_tensor(tmp_path / "m.gguf", architecture, "token_embd.weight"))
    assert says in error.value.hint


@pytest.mark.parametrize("name", ["blk.43.nextn.eh_proj.weight", "mtp.0.e_proj.weight"], ids=["llama.cpp", "ds4"])
def test_a_drafting_block_is_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="holds the MTP block of a model"):
        open_source(_with_one_tensor(tmp_path / "mtp.gguf", "deepseek4", name))


def _with_one_tensor(path: Path, architecture: str, name: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(name, np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """A real header has 129,280 tokens, as many types and 127,741 merges: cost in calls, not in seconds, is bounded."""
    count = 129_280
    texts = b"".join(struct.pack("<Q", len(text)) + text for text in (b"token%d" % i for i in range(count)))
    body = b"".join(_array_key(name, 8, count, texts) for name in ("tokens", "merges"))
    body += _array_key("types", 5, count, bytes(4 * count))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + body)
    calls = _calls(lambda: gguf_header.read(tmp_path / "m.gguf"))
    assert gguf_header.read(tmp_path / "m.gguf").metadata["tokens"][-1] == "token129279"
    assert calls < 10 * count


def _array_key(name: str, kind: int, count: int, body: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IIQ", 9, kind, count) + body


def _calls(work: Callable[[], object]) -> int:
    """Function calls, C functions included, that `work` makes."""
    total = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return total
