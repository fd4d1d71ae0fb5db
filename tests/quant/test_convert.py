"""From a plan to files: values, metadata, resumption after kill -9, and what stops a conversion."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_quant import drafts, recipe
from dsv4_quant.convert import convert, device_called, journal_of
from dsv4_quant.errors import CorruptFile, NotEnoughRoom, UnsupportedModel, WrongUse
from dsv4_quant.files import open_source
from dsv4_quant.files.gguf_writer import fill_text
from dsv4_quant.files.headers import read_header
from dsv4_quant.formats import q8_0
from dsv4_quant.journal import Journal
from dsv4_quant.metadata import QUALITY, Origin
from dsv4_quant.plan import Plan, make_plan
from tests.support import gguf_writer, killed
from tests.support.program import ROOT, environment
from tests.support.synth import Checkpoint, Shape

ORIGIN = Origin("DeepSeek-V4-Small", "deepseek-ai/DeepSeek-V4-Small", "0123abc", "MIT", "q2 --down q3_k", "{{ messages }}")


def planned(source: Path, output: Path, name: str = "mxfp4", origin: Origin = ORIGIN, **options: Any) -> Plan:
    changes = recipe.rules_of(options.pop("changes", {}))
    return make_plan(read_header(source), output, recipe.named(name), origin, changes=changes, **options)


def written(source: Path, output: Path, name: str = "mxfp4", **options: Any) -> Path:
    plan = planned(source, output, name, **options)
    convert(plan, open_source(source))
    return plan.parts[0].path


def digests(plan: Plan) -> list[str]:
    return [sha256(part.path.read_bytes()).hexdigest() for part in plan.parts]


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(folder, tmp_path_factory.mktemp("made") / "small.gguf")


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


@pytest.mark.parametrize("name", ["q2", "q1"])
def test_workers_do_not_change_a_byte(name: str, tmp_path: Path) -> None:
    source, found, threads = ROOT / "dsv4cli/assets/tiny", set(), torch.get_num_threads()
    for workers in (1, 3):
        plan = planned(source, tmp_path / f"{workers}.gguf", name)
        torch.set_num_threads(workers)
        convert(plan, open_source(source), workers=workers)
        found.add(digests(plan)[0])
    torch.set_num_threads(threads)
    assert len(found) == 1


# ---- interruptions -------------------------------------------------------------------------------------------------

DEATHS = [("wiped", 1), ("created", 1), ("torn", 2), ("written", 9), ("noted", 15), ("torn", 8), ("finished", 1), ("renamed", 2),
          ("removed", 1)]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    unbroken, output = killed.small_plan(folder, tmp_path / "unbroken.gguf"), tmp_path / "out.gguf"
    convert(unbroken, open_source(folder), workers=3)
    plan, before = killed.small_plan(folder, output), 0
    for point, count in DEATHS:
        command = [sys.executable, str(ROOT / "tests/support/killed.py"), str(folder), str(output), point, str(count)]
        assert subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), cwd=ROOT, timeout=60).returncode == -9, point
        if journal_of(output).exists():
            journal = Journal(journal_of(output))
            known = journal.resume(plan.fingerprint("", "cpu"))
            journal.close()
            assert known or point in ("wiped", "created")
            assert len(journal.done) >= before, f"{point} forgot what was done"
            assert point not in ("written", "noted") or len(journal.done) > before, f"{point}: nothing was noted"
            before = len(journal.done)
    assert before == plan.pieces
    assert digests(plan) == digests(unbroken)
    assert not journal_of(output).exists()


def test_a_ctrl_c_notes_what_was_done(folder: Path, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "out.gguf")
    seen: list[str] = []

    def press(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, open_source(folder), workers=2, report=press)
    assert not plan.output.exists()
    first, more = len(seen), []
    convert(plan, open_source(folder), report=lambda done, total, name: more.append((done, total)))
    assert len(more) <= plan.pieces - first
    assert more[-1][0] == more[-1][1] == sum(target.nbytes for target in plan.targets)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


def test_other_options_do_not_go_on_with_unfinished_work(folder: Path, tmp_path: Path) -> None:
    first = planned(folder, tmp_path / "out.gguf")
    interrupt(first, folder)
    other = planned(folder, first.output, changes={"down": "f16"})
    with pytest.raises(WrongUse, match="begun from another source or with other options"):
        convert(other, open_source(folder))
    convert(other, open_source(folder), force=True)
    expected = planned(folder, tmp_path / "expected.gguf", changes={"down": "f16"})
    convert(expected, open_source(folder))
    assert digests(other) == digests(expected)


def interrupt(plan: Plan, folder: Path) -> None:
    def press(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, open_source(folder), report=press)


def test_a_lost_draft_begins_anew(folder: Path, made: Path, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "out.gguf")
    interrupt(plan, folder)
    (tmp_path / "out.gguf.part").unlink()
    convert(plan, open_source(folder))
    assert plan.output.read_bytes() == made.read_bytes()


def test_two_programs_do_not_write_the_same_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    plan = planned(folder, tmp_path / "out.gguf")
    other = Journal(journal_of(plan.output))
    with pytest.raises(WrongUse, match=r"Another program is writing out\.gguf"):
        convert(plan, open_source(folder))
    other.close()
    convert(plan, open_source(folder))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_existing_output_is_replaced_only_when_told(folder: Path, made: Path, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "out.gguf")
    plan.output.write_text("precious")
    with pytest.raises(WrongUse, match="exists already") as caught:
        convert(plan, open_source(folder))
    assert "--force" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert plan.output.read_text() == "precious"
    convert(plan, open_source(folder), force=True)
    assert plan.output.read_bytes() == made.read_bytes()


def test_a_disk_too_small_has_both_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(folder, tmp_path / "out.gguf")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(drafts.shutil, "disk_usage", lambda folder: usage(10**9, 0, 12_345))
    with pytest.raises(NotEnoughRoom, match=rf"12,345 bytes free; {plan.nbytes:,} are needed") as caught:
        convert(plan, open_source(folder))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "change", "where"), [
    ("layers.1.attn.wkv.weight", lambda data: data[5].view(torch.uint8)[7].fill_(0x7F), "row 5, column 7"),
    ("layers.1.ffn.experts.2.w2.scale", lambda data: data[3].view(torch.uint8)[1].fill_(255), "row 3, column 32"),
    ("layers.2.ffn.experts.0.w1.scale", lambda data: data[0].view(torch.uint8)[0].fill_(254), "row 0"),
    ("embed.weight", lambda data: data[63, 2].fill_(float("inf")), "row 63, column 2"),
    ("layers.0.attn.attn_sink", lambda data: data[1].fill_(float("nan")), "row 0, column 1"),
], ids=["fp8", "fp4-scale", "fp4-overflow", "bf16", "f32"])
def test_what_is_no_number_stops_it_by_name(name: str, change: Any, where: str, folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    shard = next(path for path in bad.glob("*.safetensors") if name in load_file(path))
    data = load_file(shard)
    change(data[name])
    save_file(data, shard)
    with pytest.raises(CorruptFile, match=f"{name.replace('.scale', '.weight')} holds (nan|-?inf) in {where}") as caught:
        written(bad, tmp_path / "out.gguf")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out.gguf").exists()


def test_values_beyond_a_type_stop_it(folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    shard = next(path for path in bad.glob("*.safetensors") if "embed.weight" in load_file(path))
    data = load_file(shard)
    data["embed.weight"][3, 3] = 1e6
    save_file(data, shard)
    with pytest.raises(WrongUse, match=r"token_embd\.weight has values that f16 cannot hold"):
        written(bad, tmp_path / "out.gguf", changes={"embed": "f16"})


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
