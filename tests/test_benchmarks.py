"""The benchmarks still run: on the embedded model, for the shape of what they write; rates are nobody's promise here."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_kernels import backends
from dsv4_quant.files.headers import read_header
from dsv4cli.engine.memory import plan_model
from dsv4cli.engine.placement import Load, Placement
from tests.support.program import ROOT, environment
from tests.support.synth import Checkpoint, Shape


def first_token(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/first_token.py"), *arguments, "--gen", "3", "--runs", "1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in /proc")
def test_the_first_token_and_the_memory_of_a_run(tmp_path: Path) -> None:
    done = first_token("tiny", "--threads", "1", "--out", str(tmp_path / "runs.csv"))
    assert done.returncode == 0, done.stderr
    (run,) = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert (run["file"], run["threads"], run["tokens"]) == ("tiny", "1", "3")
    assert 0 < float(run["first_token_s"]) < 120
    assert 50 < float(run["anonymous_mb"]) < 1000  # tiny is expanded to 40 MB, and torch takes its share
    assert float(run["mapped_mb"]) > 10
    assert done.stdout.splitlines()[-1].startswith("| tiny | 1 | ")


def test_a_run_that_fails_is_shown_in_its_own_words() -> None:
    done = first_token("nonsense")
    assert done.returncode == 1
    assert "There is no model called nonsense." in done.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is looked up in /proc")
def test_the_slice_of_flash_is_made_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small: the checkpoint is whole, a run that is killed leaves its journal, and the next one finishes it."""
    spec = importlib.util.spec_from_file_location("flash_l4", ROOT / "benchmarks/flash_l4.py")
    assert spec is not None
    assert spec.loader is not None
    flash = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flash)
    small = {"hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "head_dim": 128, "o_groups": 2,
             "vocab_size": 512, "q_lora_rank": 128, "o_lora_rank": 128}
    monkeypatch.setattr(flash, "FLASH", flash.FLASH | small)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    source, output = tmp_path / "checkpoint", tmp_path / "out.gguf"
    assert flash.make(source, 3) == read_header(source).tensor_bytes
    options = argparse.Namespace(recipe="mxfp4", options="--down q8_0 -q", workers=1)
    assert flash.quantise(source, output, options, 0.2).code == -9
    done = flash.quantise(source, output, options)
    assert done.code == 0
    assert 50e6 < done.memory < flash.MOST_MEMORY
    assert read_header(output).tensors["blk.2.ffn_down_exps.weight"].dtype == "q8_0"
    assert len(flash.digest(output)) == 64


def quantize(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/quantize.py"), *arguments, "--rows", "4", "--rounds", "1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def test_rates_and_errors_of_the_encoders(tmp_path: Path) -> None:
    done = quantize("q4_k", "f16", "--llama", "wheel", "--out", str(tmp_path / "formats.csv"))
    assert done.returncode == 0, done.stderr
    q4_k, f16 = csv.DictReader((tmp_path / "formats.csv").read_text().splitlines())
    assert (q4_k["format"], q4_k["bits"], f16["bits"]) == ("q4_k", "4.5", "16.0")
    assert 0.004 < float(q4_k["error"]) < float(q4_k["llama_error"]) < 0.006
    assert float(f16["error"]) == float(f16["llama_error"])
    assert min(float(q4_k[key]) for key in ("one_thread", "two_threads", "llama_rate")) > 0
    unknown = quantize("q9_k")
    assert unknown.returncode == 2
    assert "nothing is written as q9_k" in unknown.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="CPU time is asked of the module resource")
def test_a_download_beside_a_plain_copy(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/download.py"), "--mb", "2", "--shards", "2", "--rounds", "1",
               "--scratch", str(tmp_path), "--out", str(tmp_path / "ways.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "ways.csv").read_text().splitlines()))
    assert [row["way"] for row in rows] == ["copy", "bare", "pull", "hub", "hash"]
    assert all(float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0 for row in rows)
    assert done.stdout.splitlines()[-3].startswith("| pull | ")


def simulation() -> Any:
    spec = importlib.util.spec_from_file_location("placement_benchmark", ROOT / "benchmarks/placement.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_the_usual_cache_lets_the_oldest_fall_a_tier() -> None:
    placement = Placement({(0, 0), (0, 1)}, {(0, 2)})
    recent = simulation().Recent(placement)
    recent.touch((0, 3))
    assert placement == Placement({(0, 1), (0, 3)}, {(0, 0)})  # 2 left RAM
    recent.touch((0, 1))  # only becomes younger than 3
    recent.touch((0, 0))
    assert placement == Placement({(0, 0), (0, 1)}, {(0, 3)})


def test_the_usual_cache_of_a_machine_without_vram() -> None:
    placement = Placement(set(), {(0, 0)})
    simulation().Recent(placement).touch((0, 1))
    assert placement == Placement(set(), {(0, 1)})


def test_the_placement_bound_loses_the_policies_time_in_layers() -> None:
    """Of 4 layers with 16 experts a quarter is in VRAM and the rest in RAM; 512 tokens tell which to keep."""
    module = simulation()
    load = Load(4, 16, 10_000_000, 10_000_000)
    machine = module.Machine("small", 0.16, 1, 1000, 50, 10, 1, load)
    rates = module.compare(machine, module.trace(load, 1.0, 1024))
    lost = 1 / rates["placement bound"] - 1 / rates["split bound"]
    costs = machine.costs()
    most = costs.lost + costs.parted + costs.beside + costs.read + costs.join
    assert 4 * costs.lost <= lost <= 4 * most
    assert 0.8 * rates["placement bound"] < rates["hot"] < rates["split bound"] < rates["clairvoyant"]
    assert max(rates["LRU"], rates["first layers"]) < rates["hot"]


def test_the_hosts_part_of_a_layer_is_timed() -> None:
    """With as many misses as it was asked for."""
    module, missed = simulation(), []

    def watch(door: str, given: tuple[Any, ...]) -> None:
        if door == "other_experts":
            missed.append(int((given[2].places[given[0].experts] < 0).sum()))

    with backends.watched(watch):
        assert module.host_seconds(2, times=1) > 0
    assert missed == [2] * 7


def test_a_door_of_another_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than waited for."""
    module = simulation()
    monkeypatch.setattr(module, "DOOR", "renamed")
    with pytest.raises(SystemExit, match="renamed"):
        module.recorded("tiny", 20)


def test_choices_that_a_model_made_are_replayed() -> None:
    """Of tiny: 4 layers, 2 of 8 experts each; its first layer chooses by token, so the same token chooses the same there."""
    module = simulation()
    tokens, experts = module.recorded("tiny", 60)
    assert (len(tokens), experts) == (60, 8)
    assert all(len(token) == 4 and all(len(set(chosen)) == 2 for chosen in token) for token in tokens)
    assert {number for token in tokens for chosen in token for number in chosen} <= set(range(8))
    assert 0.5 < module.busier(tokens, experts) < 1
    small = module.shrunk(module.MACHINES[0], tokens, experts)
    assert (small.visits, sum(small.slots())) == (2, 32 * (12 + 180) * 10**9 // (43 * 256 * module.FLASH.expert_bytes))
    rates = module.compare(small, tokens)
    assert 0 < rates["hot"] <= rates["clairvoyant"]


def test_foretold_and_measured_rates_stand_side_by_side(tmp_path: Path) -> None:
    """The machinery alone: so small a model's rate is not foretold well."""
    model = Checkpoint(Shape(ratios=(0, 4), hidden=1024, width=512, experts=96, q_rank=128), seed=2).write(tmp_path / "model")
    command = [sys.executable, str(ROOT / "benchmarks/foretold.py"), str(model), "--rounds", "1", "--gen", "4",
               "--passes", "1", "--out", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert float(row["error"]) == pytest.approx(float(row["foretold"]) / float(row["measured"]) - 1)
    seconds = 1 / float(row["foretold_before"]) + 1 / float(row["foretold_after"])
    assert float(row["foretold"]) == pytest.approx(2 / seconds)
    assert min(float(row["memory_before"]), float(row["memory_after"])) > 0.1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="control groups are Linux's")
def test_a_model_larger_than_its_memory(tmp_path: Path) -> None:
    """Under a real limit: the same bits, experts read ahead, and nobody is killed."""
    shape = Shape(ratios=(0, 4, 128), hidden=1024, width=512, experts=192, chosen=6, q_rank=128)
    model = Checkpoint(shape, seed=2).write(tmp_path / "large")
    whole = plan_model(read_header(model), "large", ctx=24, numerics="official", available=None)
    assert whole.experts > 0.25 * whole.needed  # else it would fit beside the program
    command = [sys.executable, str(ROOT / "benchmarks/larger_than_ram.py"), str(model), "--limit",
               str(whole.least + whole.experts // 3), "--tokens", "16", "--prompt", "8", "--settings", "no limit;limit",
               "--out", str(tmp_path / "runs.csv")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    free, bound = csv.DictReader((tmp_path / "runs.csv").read_text().splitlines())
    assert float(free["planned_on_disk_gb"]) == 0 < float(bound["planned_on_disk_gb"])
    assert (free["digest"], bound["killed"]) == (bound["digest"], "0")
    assert 1e9 * float(bound["peak_gb"]) <= whole.least + whole.experts // 3


def test_a_share_of_the_experts_on_a_card(tmp_path: Path) -> None:
    model, table = Checkpoint(Shape(), 1).write(tmp_path / "small"), tmp_path / "rows.csv"
    command = [sys.executable, str(ROOT / "benchmarks/tiers.py"), str(model), "--shares", "0,0.5", "--numerics", "plain",
               "--prompt", "20", "--tokens", "6", "--most", "1e-5", "--out", str(table)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr + done.stdout
    whole, none, half = csv.DictReader(table.read_text().splitlines())
    assert (whole["slots"], none["slots"], half["slots"]) == ("", "0", "20")
    assert (float(whole["hits"]), float(none["hits"])) == (1, 0)
    assert 0 < float(half["hits"]) < 1
    assert 0 < float(half["error"]) < 1e-5 or half["error"] == "0.0"
    assert all(float(row["decode_tok_s"]) > 0 and float(row["bound_tok_s"]) > 0 for row in (whole, none, half))
