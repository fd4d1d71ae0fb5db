"""What stops a conversion: kill -9, Ctrl-C, a full disk, numbers that are none; and how it goes on."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_quant import drafts
from dsv4_quant.convert import convert, journal_of
from dsv4_quant.errors import CorruptFile, NotEnoughRoom, WrongUse
from dsv4_quant.files import open_source
from dsv4_quant.journal import Journal
from dsv4_quant.plan import Plan
from tests.support import killed
from tests.support.conversion import digests, planned, written
from tests.support.program import ROOT, environment
from tests.support.synth import Checkpoint, Shape

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


def test_a_disk_that_fills_up_on_the_way(folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, write, calls = planned(folder, tmp_path / "out.gguf"), drafts.Drafts.write, iter(range(30))

    def full(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(drafts.Drafts, "write", full)
        with pytest.raises(NotEnoughRoom, match=f"The disk is full: .* needs {plan.nbytes:,} bytes") as caught:
            convert(plan, open_source(folder))
    assert "goes on where it stopped" in caught.value.hint
    seen: list[str] = []
    convert(plan, open_source(folder), report=lambda done, total, name: seen.append(name))
    assert len(seen) <= plan.pieces - 20
    assert plan.output.read_bytes() == made.read_bytes()


def test_a_base_release_in_fp8(tmp_path: Path) -> None:
    """FP8 experts under float32 scales: nothing to copy, all to encode; the nearest MXFP4 is a few percent away."""
    folder = Checkpoint(Shape(base=True, width=256), seed=9).write(tmp_path / "base")
    ours, official = open_source(written(folder, tmp_path / "base.gguf")), open_source(folder)
    for name in ("layers.1.ffn.experts.3.w1.weight", "layers.4.ffn.experts.0.w2.weight"):
        packed, expected = ours.read(name), official.read(name).float()
        assert packed.format == "mxfp4"
        assert float((packed.float() - expected).square().sum() / expected.square().sum()) < 0.02


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
