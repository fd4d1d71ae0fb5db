"""From a plan to files: values, metadata, importance."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from dsv4_quant.convert import convert, device_called
from dsv4_quant.errors import UnsupportedModel, WrongUse
from dsv4_quant.files import open_source
from dsv4_quant.files.gguf_writer import fill_text
from dsv4_quant.formats import q8_0
from dsv4_quant.metadata import QUALITY, Origin
from tests.support import gguf_writer
from tests.support.conversion import ORIGIN, digests, planned, written
from tests.support.program import ROOT
from tests.support.synth import Checkpoint, Shape

# ---- what is in the file -------------------------------------------------------------------------------------------


def test_every_value_is_what_its_type_can_hold(folder: Path, made: Path) -> None:
    """FP4, BF16 and F32 exactly, FP8 as Q8_0 rounds it."""
    official, ours = open_source(folder), open_source(made)
    checked = 0
    for target in planned(folder, made).targets:
        for name in target.official:
            before, after = official.read(name), ours.read(name)
            expected = before.float()
            if before.format == "fp8_e4m3" or name == "head.weight":
                expected = q8_0.decode(q8_0.encode(expected), None)
            torch.testing.assert_close(after.float(), expected, rtol=0, atol=0)
            checked += 1
    assert checked > 100


def test_gguf_py_finds_the_same_tensors(folder: Path, made: Path) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    targets = planned(folder, made).targets
    assert list(found) == [target.name for target in targets]
    for target in targets:
        tensor = found[target.name]
        assert tuple(int(size) for size in reversed(tensor.shape)) == target.shape
        assert tensor.tensor_type.name.lower() == target.type
        assert (tensor.n_bytes, tensor.data_offset) == (target.nbytes, target.offset)


def fields(path: Path) -> dict[str, tuple[list[str], Any]]:
    """Key -> types and value, as gguf-py reads them."""
    return {name: ([kind.name for kind in field.types], field.contents()) for name, field in gguf.GGUFReader(path).fields.items()}


def test_model_keys_are_those_of_llamacpps_converter(folder: Path, made: Path, tmp_path: Path) -> None:
    """The writer of the tests was made from the specification on its own; ds4's vocab_size comes on top."""
    other = fields(gguf_writer.write(open_source(folder), tmp_path / "other.gguf"))
    ours = fields(made)
    expected = {key: value for key, value in other.items() if key.startswith("deepseek4.")}
    assert len(expected) == len(gguf_writer.model_keys(open_source(folder).config))
    assert {key: value for key, value in ours.items() if key.startswith("deepseek4.")} == expected | {
        "deepseek4.vocab_size": (["UINT32"], 64)}


def test_tokenizer_keys(tmp_path: Path) -> None:
    """Of the embedded model, as the tests' own writer has them from the specification; the template comes on top."""
    folder = shutil.copytree(ROOT / "dsv4cli/assets/tiny", tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.0, "top_p": 0.95}')
    ours = fields(written(folder, tmp_path / "tiny.gguf"))
    other = fields(gguf_writer.write(open_source(folder), tmp_path / "other.gguf"))
    tokenizer = {key: value for key, value in ours.items() if key.startswith("tokenizer.")}
    assert tokenizer == {key: value for key, value in other.items() if key.startswith("tokenizer.")} | {
        "tokenizer.chat_template": (["STRING"], "{{ messages }}")}
    assert ours["general.sampling.temp"] == (["FLOAT32"], 1.0)
    assert ours["general.sampling.top_p"][1] == pytest.approx(0.95)
    kinds = tokenizer["tokenizer.ggml.token_type"][1]
    assert {1, 3, 4} <= set(kinds)


def test_dspark_keys(tmp_path: Path) -> None:
    """spec/checkpoint.md section 5.4."""
    folder = Checkpoint(Shape(stages=3, dspark=True), seed=5).write(tmp_path / "dspark")
    trunk, drafter = (fields(written(folder, tmp_path / f"{stages}.gguf", stages=stages)) for stages in ("none", "dspark"))
    for key in ("general.architecture", "deepseek4.block_count", "deepseek4.hash_layer_count", "deepseek4.swiglu_clamp_exp"):
        assert key in trunk
    assert drafter["general.architecture"][1] == "dflash"
    assert not any(key.startswith("deepseek4.") for key in drafter)
    expected = {
        "block_count": 3, "attention.compress_ratios": [0, 0, 0], "hash_layer_count": 0, "block_size": 5,
        "target_layers": [3, 4, 5], "embedding_length": 256, "swiglu_clamp_exp": [10.0] * 3}
    assert {key: drafter[f"dflash.{key}"][1] for key in expected} == expected
    assert "dflash.embedding_length_out" not in drafter
    assert drafter["tokenizer.ggml.mask_token_id"] == (["UINT32"], 511)


def test_general_keys(made: Path) -> None:
    keys = {key: value for key, (_, value) in fields(made).items() if not key.startswith(("deepseek4.", "GGUF."))}
    sizes = {tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(made).tensors}
    routed = sum(size for name, size in sizes.items() if "exps" in name)
    label = gguf.size_label(sum(sizes.values()), sum(sizes.values()) - routed, routed // 3, 3)
    url = "https://huggingface.co/deepseek-ai/DeepSeek-V4-Small"
    assert keys == {
        "general.architecture": "deepseek4", "general.type": "model", "general.name": "DeepSeek-V4-Small",
        "general.size_label": label, "general.file_type": int(gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
        "general.quantization_version": 2, "general.license": "mit", "general.source.repo_url": url,
        "general.source.url": f"{url}/tree/0123abc", "general.base_model.count": 1,
        "general.base_model.0.name": "DeepSeek-V4-Small", "general.base_model.0.organization": "deepseek-ai",
        "general.base_model.0.repo_url": url, "general.base_model.0.version": "0123abc",
        "tokenizer.ggml.model": "none", "tokenizer.chat_template": "{{ messages }}", "dsv4.recipe": "q2 --down q3_k",
        QUALITY: " " * 2048,
    }


def test_the_quality_is_filled_in_without_moving_anything(made: Path, tmp_path: Path) -> None:
    copy = shutil.copy(made, tmp_path / "copy.gguf")
    fill_text(copy, QUALITY, '{"kld": 0.1}')
    assert fields(copy)[QUALITY][1].rstrip() == '{"kld": 0.1}'
    assert copy.stat().st_size == made.stat().st_size
    assert copy.read_bytes().replace(b'{"kld": 0.1}', b" " * 12) == made.read_bytes()
    with pytest.raises(WrongUse, match="room for 2048 bytes, not for 3000"):
        fill_text(copy, QUALITY, "x" * 3000)
    with pytest.raises(WrongUse, match=r"has no key dsv4\.other"):
        fill_text(copy, "dsv4.other", "")


def test_a_gguf_becomes_a_gguf(made: Path, folder: Path, tmp_path: Path) -> None:
    """What has its type already is copied; the origin and the template that the first file names are handed on."""
    again = written(made, tmp_path / "again.gguf", origin=Origin("DeepSeek-V4-Small", recipe=ORIGIN.recipe))
    assert fields(again) == fields(made)
    first, second = open_source(made), open_source(again)
    for target in planned(folder, made).targets:
        for name in target.official:
            assert torch.equal(first.read(name).data, second.read(name).data), name


def test_parts_of_a_split_file(folder: Path, made: Path, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "split.gguf", part_size=300_000)
    convert(plan, open_source(folder))
    assert len(plan.parts) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [part.path.name for part in plan.parts]
    assert all(fields(part.path)["split.no"] == (["UINT16"], number) for number, part in enumerate(plan.parts))
    whole, split = open_source(made), open_source(plan.parts[0].path)
    assert torch.equal(whole.read("layers.2.ffn.experts.2.w2.weight").data, split.read("layers.2.ffn.experts.2.w2.weight").data)


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    source, found, threads = ROOT / "dsv4cli/assets/tiny", set(), torch.get_num_threads()
    for workers in (1, 3):
        plan = planned(source, tmp_path / f"{workers}.gguf", "q1", changes={"down": "q2_k"})
        torch.set_num_threads(workers)
        convert(plan, open_source(source), workers=workers)
        found.add(digests(plan)[0])
    torch.set_num_threads(threads)
    assert len(found) == 1


class Matrix:
    """An importance matrix of ones, or of another width for one tensor."""

    keys: Mapping[str, Any] = {"file": "calibration.gguf", "dataset": "ours", "entries_count": 3, "chunks_count": 7}
    fingerprint = "f00"

    def __init__(self, columns: Mapping[str, int], wrong: str = "") -> None:
        self.columns, self.wrong = columns, wrong
        self.asked: set[tuple[str, int | None]] = set()

    def for_tensor(self, name: str, expert: int | None) -> Tensor | None:
        self.asked.add((name, expert))
        return torch.ones(self.columns[name] + (name == self.wrong)) if name in self.columns else None


def test_importance_is_asked_for_by_tensor_and_expert(folder: Path, tmp_path: Path) -> None:
    origin = replace(ORIGIN, imatrix=Matrix.keys)
    plan = planned(folder, tmp_path / "out.gguf", origin=origin, changes={"experts": "q8_0"})
    matrix = Matrix({target.name: target.columns for target in plan.targets})
    convert(plan, open_source(folder), importance=matrix)
    assert {("blk.1.ffn_down_exps.weight", 2), ("blk.0.attn_kv.weight", None)} <= matrix.asked
    keys = fields(plan.output)
    assert keys["quantize.imatrix.file"] == (["STRING"], "calibration.gguf")
    assert keys["quantize.imatrix.chunks_count"] == (["UINT32"], 7)


def test_importance_of_another_model(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "out.gguf")
    matrix = Matrix({"blk.1.attn_kv.weight": 128}, wrong="blk.1.attn_kv.weight")
    with pytest.raises(WrongUse, match=r"another model: blk\.1\.attn_kv\.weight has 128 columns, the matrix \[129\]"):
        convert(plan, open_source(folder), importance=matrix)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_has_its_drafting_stages_elsewhere(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="drafting stages are a file of their own"):
        planned(made, tmp_path / "mtp.gguf", stages="mtp")


def test_a_device_that_is_not_there() -> None:
    assert device_called(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(WrongUse, match="no device toaster"):
        device_called("toaster")
