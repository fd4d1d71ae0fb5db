"""`list`, `show` and `doctor`: what they say about models and about the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv4_kernels import backends, speeds
from dsv4cli import paths
from dsv4cli.commands import doctor, machine
from dsv4cli.console import in_bytes
from dsv4cli.engine import device, measuring, memory
from dsv4cli.engine.device import card_trouble
from dsv4cli.engine.machine import load
from dsv4cli.model import recording
from tests.support.program import Outcome, environment
from tests.support.replay import Replay
from tests.support.synth import Checkpoint, Shape

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(Shape(), seed=1).write(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "random")


def test_show_counts_every_tensor_once(run_dsv4: Run, checkpoint: Path) -> None:
    told = json.loads(run_dsv4("show", str(checkpoint), "--json").out)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert sum(part["tensors"] for part in told["parts"]) == len(index["weight_map"])
    assert sum(part["nbytes"] for part in told["parts"]) == index["metadata"]["total_size"]
    assert "other" not in {part["role"] for part in told["parts"]}
    assert told["path"] == str(checkpoint)
    assert told["layout"] == "official"


def test_show_tells_the_architecture(run_dsv4: Run, checkpoint: Path) -> None:
    shown = run_dsv4("show", str(checkpoint))
    assert shown.code == 0
    lines = dict(line.split(None, 1) for line in shown.out.splitlines() if len(line.split(None, 1)) == 2)
    assert lines["layers"] == "5 (2 window only, 2 ratio 4, 1 ratio 128; 1 hash-routed)"
    assert lines["indexer"].split()[:2] == ["14", "823.6"]  # its line among the roles, below that of the architecture
    assert lines["longest"] == "context  1,048,576 tokens"
    assert lines["routed_expert"].split() == ["240", "2.1", "MB", "FP4", "94", "%,", "E8M0", "scales", "6", "%"]
    assert "license" not in lines  # nobody knows


def test_show_finds_the_license_beside_the_weights(run_dsv4: Run, checkpoint: Path) -> None:
    (checkpoint / "LICENSE").write_text("\nMIT License\n\nCopyright\n")
    assert json.loads(run_dsv4("show", str(checkpoint), "--json").out)["license"] == "MIT License"


def test_show_of_a_model_elsewhere_gives_what_is_published(run_dsv4: Run) -> None:
    told = json.loads(run_dsv4("show", "flash@0731", "--json").out)
    assert (told["path"], told["bytes"], told["tensors"], told["release"]) == (None, 166878536440, 72317, "0731")
    assert told["architecture"] is None
    assert "not on this machine" in run_dsv4("show", "pro").out


@pytest.mark.parametrize(("harm", "code"), [
    (lambda folder: (folder / "config.json").write_text("{"), 4),
    (lambda folder: (folder / "config.json").write_text("{}"), None),
    (lambda folder: next(folder.glob("*.safetensors")).unlink(), 4),
    (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"12345678"), 4),
    (lambda folder: _edit(folder, architectures=["DeepseekV41ForCausalLM"], model_type="deepseek_v41"), 1),
    (lambda folder: _edit(folder, hidden_size=512), 4),
])
def test_damaged_and_foreign_models_are_one_sentence(run_dsv4: Run, checkpoint: Path, harm: Callable[[Path], object],
                                                     code: int | None) -> None:
    harm(checkpoint)
    shown = run_dsv4("show", str(checkpoint))
    assert shown.code == code if code else shown.code in (1, 4)
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) <= 2
    assert "unexpected" not in shown.err


def _edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_v41_is_called_by_its_name(run_dsv4: Run, checkpoint: Path) -> None:
    _edit(checkpoint, architectures=["DeepseekV41ForCausalLM"], model_type="deepseek_v41")
    assert "V4.1" in run_dsv4("show", str(checkpoint)).err


def test_list_shows_finished_models_only(run_dsv4: Run, checkpoint: Path) -> None:
    paths.models().mkdir(parents=True)
    mine = shutil.copytree(checkpoint, paths.models() / "mine")
    shutil.copytree(checkpoint, paths.models() / "unfinished")
    (mine / "manifest.json").write_text(json.dumps({"name": "mine", "release": "0731", "license": "MIT"}))
    told = {entry["name"]: entry for entry in json.loads(run_dsv4("list", "--json").out)}
    assert told["mine"]["path"] == str(mine)
    assert told["mine"]["bytes"] == sum(file.stat().st_size for file in mine.glob("*.safetensors"))
    assert "unfinished" not in told
    assert run_dsv4("ls").out == run_dsv4("list").out
    row = next(line for line in run_dsv4("list").out.splitlines() if line.startswith("mine"))
    assert row.split()[-2:] == ["0731", str(mine)]


def test_doctor_tells_values_with_their_origins(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_TEMP", "0.5")
    told = json.loads(run_dsv4("doctor", "--json").out)
    assert list(told) == ["versions", "cpu", "memory", "gpu", "measured", "paths", "settings", "cpu kernels",
                          "backends"]
    assert told["cpu kernels"]["threads"] >= 1
    assert told["settings"]["temp"] == {"value": 0.5, "origin": "DSV4_TEMP"}
    assert told["settings"]["think"] == {"value": "high", "origin": "default"}
    assert told["paths"]["models"]["path"] == str(paths.models())
    assert told["paths"]["models"]["free"] > 0
    assert told["cpu"]["cores allowed"] >= 1
    assert told["memory"]["available to a model"]["bytes"] <= told["memory"]["installed"]["bytes"]
    assert all(choice["reason"] for choice in told["backends"].values())


def test_doctor_measures_when_asked_and_remembers(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SAMPLE", 16 << 20)
    monkeypatch.setattr(measuring, "BUFFER", 32 << 20)
    monkeypatch.setattr(measuring, "PASSES", 1)
    assert "rates" in json.loads(run_dsv4("doctor", "--json").out)["measured"]
    done = run_dsv4("doctor", "--measure", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)["measured"]
    profile = load()
    assert profile is not None
    assert told["memory"] == {"bytes_s": profile.memory}
    assert told["disk, at random"] == {"bytes_s": profile.random}
    assert told["disk of"] == str(paths.models())
    shown = run_dsv4("doctor").out
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert ["date", profile.date] in lines
    assert ["memory", f"{in_bytes(int(profile.memory or 0))}/s"] in lines
    if backends.cpu_trouble() is None:
        assert set(profile.kernels) == set(speeds.MEASURED)
        assert any(line.startswith("  kernels, iq2_xxs") and line.endswith("/s") for line in shown.splitlines())


def test_doctor_refuses_to_measure_without_room(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SAMPLE", 1 << 60)
    done = run_dsv4("doctor", "--measure")
    assert done.code == 3
    assert "free on the disk" in done.err
    assert load() is None


def test_without_a_compiler_doctor_says_why_and_models_still_run(tmp_path: Path) -> None:
    blind = {**environment(), "CXX": str(tmp_path / "no-compiler"), "DSV4_NATIVE_FOLDER": str(tmp_path)}
    command = [sys.executable, "-m", "dsv4cli"]
    told = subprocess.run([*command, "doctor", "--json"], capture_output=True, text=True, check=True, env=blind)
    assert "no C++ compiler" in json.loads(told.stdout)["cpu kernels"]["trouble"]
    assert json.loads(told.stdout)["backends"]["linear on cpu"]["backend"] == "ref"
    asked = subprocess.run([*command, "run", "tiny", "What is the capital of France?", "--think", "off", "--temp", "0"],
                           capture_output=True, text=True, check=True, env=blind)
    assert "Paris" in asked.stdout
    assert asked.stderr.count("no C++ compiler") == 1


def test_doctor_is_readable(run_dsv4: Run) -> None:
    shown = run_dsv4("doctor")
    assert shown.code == 0
    assert "  temp            not set  (default)" in shown.out
    assert "  moe          cpu      -" in shown.out
    assert f"  cuda: {card_trouble()}" in shown.out
    assert "\x1b" not in shown.out


def test_doctor_tells_of_each_operation_on_each_device(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card that has kernels for all operations but one."""
    told = json.loads(run_dsv4("doctor", "--json").out)["backends"]
    assert told["moe on cuda"] == {"backend": None, "reason": card_trouble()}
    monkeypatch.setattr(device, "card_trouble", lambda: None)
    monkeypatch.setattr(machine, "tried", lambda device: f"tried on {device}")
    exists = backends._exists
    monkeypatch.setattr(backends, "_exists", lambda op, name: exists(op, name) and (op, name) != ("router", "gpu"))
    backends.pick.cache_clear()
    told = json.loads(run_dsv4("doctor", "--json").out)["backends"]
    assert told["moe on cuda"] == {"backend": "gpu", "reason": "gpu is written for cuda"}
    assert told["router on cuda"]["backend"] == "ref"
    shown = run_dsv4("doctor").out
    assert "tried on cuda" in shown
    assert "  moe          cpu      gpu\n" in shown
    assert "  router       cpu      ref       cuda: router has no implementation of its own for cuda\n" in shown
    backends.pick.cache_clear()


def test_doctor_tells_whether_tokens_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stand-in records, where recording is refused, and where the card does not even compute."""
    def refuse() -> Replay:
        raise RuntimeError("not permitted while capturing\nand so on")

    def broken(device: torch.device) -> None:
        raise RuntimeError("out of memory")

    for record, told in ((lambda device: Replay, "recorded once and replayed as a graph"),
                         (lambda device: refuse, "one by one, since recording one failed: not permitted while capturing"),
                         (broken, "nobody knows whether their launches can be recorded: out of memory")):
        monkeypatch.setattr(recording, "recorder", record)
        assert machine.tried("cpu").endswith(told)


def test_doctor_survives_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: "")
    monkeypatch.setattr(machine, "_installed_memory", lambda: None)
    assert machine.cpu()["instructions"] == []
    assert machine.memory()["control group's limit"] == {"limit": None}
    assert doctor._in_words({"bytes": None}) == "unknown"


def test_doctor_tells_limits_from_what_nobody_knows(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_group_limit", lambda: None)
    monkeypatch.setattr(memory, "address_space", lambda: 3 * 10**9)
    monkeypatch.setattr(memory, "swapped_bytes", lambda: 2 * 10**9)
    rows = dict(line.strip().split("  ", 1) for line in run_dsv4("doctor").out.split("memory\n")[1].split("\n\n")[0].splitlines())
    assert {name: value.strip() for name, value in rows.items() if name not in ("installed", "available to a model")} == {
        "in swap": "2.0 GB", "control group's limit": "none", "left to map (ulimit -v)": "3.0 GB"}


@pytest.mark.parametrize(("files", "limit"), [
    ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n", "/sys/fs/cgroup/a/memory.max": "1000\n"}, 1000),
    ({"/proc/self/cgroup": "5:cpu,memory:/x\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000\n"}, 2000),
    ({"/proc/self/cgroup": "5:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ({}, None),
])
def test_control_groups_of_both_versions(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: files.get(str(path), ""))
    assert machine._group_limit() == limit
