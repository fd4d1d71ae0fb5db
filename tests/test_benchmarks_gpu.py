"""The card's benchmark runs from end to end in Triton's interpreter; its rates mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from dsv4_quant.recipe import named
from tests.kernels.interpreter import QUIET, of
from tools.random_model import RandomSource

pytestmark = QUIET

of("linear")


def test_everything_runs_small_and_agrees_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small"]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = [dict(zip(gpu.FIELDS, line.strip("| ").split(" | "), strict=False)) for line in shown[2:] if line.startswith("| ")]
    assert {row["what"].partition(".")[0] for row in rows} == {"card", *gpu.OPERATIONS}
    assert {row["what"] for row in rows} >= {"model.prompt", "model.decode", "card.copy", "moe.routed_experts"}
    assert shown[-1].startswith("No rival: ")


def test_what_is_far_from_the_reference_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_kernels.norm_rope.gpu.rms_norm", lambda x, weight, eps: x * float("nan"))
    assert gpu.main(["--small", "--only", "norm_rope"]) == 1
    assert "norm_rope.rms_norm (, 1 tokens) is nan from the reference" in capsys.readouterr().err


def test_times_of_the_interpreter_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--small", "--out", str(out)]) == 2
    assert gpu.main(["--out", str(out)]) == 2
    monkeypatch.setattr("dsv4_kernels.gpu.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(out)]) == 2
    assert gpu.main(["--small"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "no card" in told.err
    assert len(told.err.splitlines()) == 4
    assert not out.exists()


def test_the_rivals_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in its place that says what llama-bench says, for a prompt and for two depths."""
    said = [[{"n_prompt": 8192, "n_gen": 0, "n_depth": 0, "avg_ts": 900.5}],
            [{"n_prompt": 0, "n_gen": 64, "n_depth": depth, "avg_ts": 30.0} for depth in (128, 4096)]]
    program = tmp_path / "llama-bench"
    first, second = map(json.dumps, said)
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *'-n 0'*) echo '{first}';; *) echo '{second}';; esac\n")
    program.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(program))
    rows = list(gpu.rival("some/flash.gguf", gpu.FLASH))
    assert rows[0] == {"what": "llama.cpp.prompt", "format": "flash.gguf", "tokens": 8192, "context": 0, "tok_s": 900.5}
    assert [(row["what"], row["context"], row["tok_s"]) for row in rows[1:]] == [("llama.cpp.decode", 128, 30.0),
                                                                               ("llama.cpp.decode", 4096, 30.0)]


def test_full_size_flash_is_as_large_as_its_recipe_says() -> None:
    """The issue's bound of some 9 GB a token and its cards' memory stand on this; nothing is made."""
    random = torch.Generator()
    source = RandomSource(gpu.flash(gpu.LAYERS), named("q2"), random)
    assert len(source.config.compress_ratios) >= gpu.LAYERS == source.config.num_hidden_layers
    nbytes = sum(source.sizes().values())
    assert 80e9 < nbytes < 100e9
    fewer = gpu.fitting(random, nbytes // 2)
    assert fewer is not None
    assert 18 <= fewer.config.num_hidden_layers <= 22
    assert gpu.fitting(random, 1 << 30) is None
