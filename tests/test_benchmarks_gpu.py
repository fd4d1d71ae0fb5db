"""The card's benchmark runs from end to end in Triton's interpreter; its rates mean nothing there."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_whole
from dsv4_kernels import alloc, backends
from dsv4_quant.recipe import named
from dsv4cli.engine.bench import Row
from dsv4cli.engine.sampling import Sampling
from tests.kernels.interpreter import QUIET, of
from tests.support.launches import launches
from tools.random_model import RandomSource

pytestmark = QUIET

of("linear")


def rows_of(shown: str) -> list[dict[str, str]]:
    return [dict(zip(gpu.SHOWN, line.strip("|").split("|"), strict=False)) for line in shown.splitlines()[2:]]


def test_everything_runs_small_and_agrees_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """And no kernel is launched by the model's parts that the kernels' own parts leave out."""
    parts = gpu.parts_of(argparse.Namespace(small=True, only="", eager=False, gguf=None, out=None), torch.device("cpu"))
    launched: dict[bool, set[str]] = {True: set(), False: set()}
    rows = []
    alloc.poison(False)
    for part in parts[:-1]:
        with launches() as log:
            rows += list(part.rows())
        launched[part.op == "model"] |= {name for name in log if not name.startswith("torch.")}
    assert launched[True] - launched[False] == set()
    assert len(launched[True]) > 20
    assert max(row.get("error", 0) for row in rows) < 1e-4
    assert {row["what"].partition(".")[0] for row in rows} == {"card", *backends.OPERATIONS, "model"}
    assert {"model.prompt", "model.decode", "model.chunked, official"} <= {row["what"] for row in rows}
    assert all(row["target"] == 4000 for row in rows if row["what"] == "model.prompt")


def test_one_failure_costs_one_part(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("out of resources\nand much more")

    monkeypatch.setattr("dsv4_kernels.norm_rope.gpu.rotate", broken)
    monkeypatch.setattr("dsv4_kernels.norm_rope.gpu.rms_norm", lambda x, weight, eps: x * float("nan"))
    assert gpu.main(["--small", "--only", "norm_rope"]) == 1
    told = capsys.readouterr()
    assert "norm_rope.rms_norm (, 1 tokens) is nan from the reference" in told.err
    rows = rows_of(told.out)
    assert [row["what"].strip() for row in rows[3:]] == ["norm_rope.rms_norm", "norm_rope.norms  1", "norm_rope.rms_norm",
                                                         "norm_rope.norms  9"]
    assert [row["trouble"].strip() for row in rows[4::2]] == ["out of resources"] * 2


def test_where_the_process_dies_another_goes_on_behind_what_it_had_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [gpu.Part("card", f"part {number}", lambda: iter(())) for number in range(6)]
    deaths, asked, told = {0: (1, gpu.DEAD), 2: (4, -11), 5: (None, 1)}, [], []

    def child(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        after, place = (command[command.index(option) + 1] for option in ("--after", "--place"))
        asked.append(int(after))
        begun, code = deaths[int(after)]
        if begun is not None:
            Path(place).write_text(str(begun))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(gpu.subprocess, "run", child)
    assert gpu.supervised(["--eager"], parts, told.append) == 1
    assert asked == [0, 2, 5]
    assert [row["what"] for row in told] == ["part 1", "part 4"]
    assert told[1]["trouble"] == "the process ended with -11"
    deaths[5] = (5, gpu.DEAD)
    assert gpu.supervised([], parts, told.append) == 1
    deaths[0] = (None, 2)
    assert gpu.supervised([], parts, told.append) == 2


def test_a_process_begins_where_it_is_told_and_notes_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, told, seen = tmp_path / "part", [], []

    def rows(number: int) -> Iterator[dict[str, str]]:
        seen.append(place.read_text())
        yield {"what": f"row {number}"}

    parts = [gpu.Part("card", f"part {number}", partial(rows, number)) for number in range(4)]
    assert gpu.run(parts, 2, place, told.append)
    assert [row["what"] for row in told] == ["row 2", "row 3"]
    assert seen == ["2", "3"]
    monkeypatch.setattr(gpu, "lost", lambda: True)
    assert not gpu.run(parts, 0, place, told.append)
    assert place.read_text() == "0"


def test_texts_are_compared_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

        def chat(self, messages: object, *, sampling: Sampling, max_tokens: int) -> Iterator[argparse.Namespace]:
            assert sampling.greedy
            return (argparse.Namespace(id=number) for number in self.ids[:max_tokens])

    answers = {("plain", "cuda"): [1, 2, 3, 4], ("plain", "cpu"): [1, 2, 3, 4], ("official", "cuda"): [1, 2, 9],
               ("official", "cpu"): [1, 2, 3, 4]}
    monkeypatch.setattr(gpu_whole.Engine, "open", lambda name, numerics, device: Fake(answers[numerics, device]))
    found = list(gpu_whole.texts("cuda", nullcontext, ["?"], 60))
    assert [(row["format"], row["error"]) for row in found] == [("plain", 0.0), ("official", 0.5)]


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
    """With a program in its place that says what llama-bench says, for a prompt and for two depths; and with a binding."""
    said = [[{"n_prompt": 8192, "n_gen": 0, "n_depth": 0, "avg_ts": 900.5}],
            [{"n_prompt": 0, "n_gen": 64, "n_depth": depth, "avg_ts": 30.0} for depth in (128, 4096)]]
    program = tmp_path / "llama-bench"
    first, second = map(json.dumps, said)
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *'-n 0'*) echo '{first}';; *) echo '{second}';; esac\n")
    program.chmod(0o755)
    ours = Row(8192, 64, 128, 4100.0, 200.0, 1, None, None)
    monkeypatch.setattr(gpu_whole, "measure", lambda *given, **_: [ours])
    monkeypatch.setattr(gpu_whole.shutil, "which", lambda name: str(program))
    rows = list(gpu_whole.rival("some/flash.gguf", gpu.FLASH, "cuda"))
    assert [(row["what"], row["context"], row["tok_s"]) for row in rows] == [
        ("dsv4.prompt", 128, 4100.0), ("dsv4.decode", 128, 200.0), ("llama.cpp.prompt", 0, 900.5),
        ("llama.cpp.decode", 128, 30.0), ("llama.cpp.decode", 4096, 30.0)]
    assert {row["format"] for row in rows} == {"flash.gguf"}

    monkeypatch.setattr(gpu_whole.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="there is no llama"):
        list(gpu_whole.rival("some/flash.gguf", gpu.FLASH, "cuda"))
    with pytest.raises(RuntimeError, match="no file was named"):
        list(gpu_whole.rival(None, gpu.FLASH, "cuda"))


def test_a_rival_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding in its place that counts what it is given."""
    evaluated: list[int] = []

    class Llama:
        def __init__(self, file: str, *, n_gpu_layers: int, n_ctx: int, verbose: bool) -> None:
            assert (n_gpu_layers, n_ctx) == (-1, 11)

        def eval(self, ids: list[int]) -> None:
            evaluated.append(len(ids))

        def reset(self) -> None:
            evaluated.append(0)

    binding = argparse.Namespace(Llama=Llama, llama_supports_gpu_offload=lambda: True)
    monkeypatch.setitem(sys.modules, "llama_cpp", binding)
    rows = list(gpu_whole._by_binding("some/flash.gguf", gpu.SMALL))
    assert [(row["what"], row["context"]) for row in rows] == [("llama.cpp.prompt", 0), ("llama.cpp.decode", 9)]
    assert evaluated == [8, 8, 0, 5, 0, 9, 1]
    binding.llama_supports_gpu_offload = lambda: False
    with pytest.raises(RuntimeError, match="without a card"):
        list(gpu_whole._by_binding("some/flash.gguf", gpu.SMALL))


def test_full_size_flash_is_as_large_as_its_recipe_says() -> None:
    """The issue's bound of some 9 GB a token and its cards' memory stand on this; nothing is made."""
    random = torch.Generator()
    source = RandomSource(gpu_whole.flash(gpu_whole.LAYERS), named("q2"), random)
    assert len(source.config.compress_ratios) >= gpu_whole.LAYERS == source.config.num_hidden_layers
    nbytes = sum(source.sizes().values())
    assert 80e9 < nbytes < 100e9
    fewer = gpu_whole.fitting(random, nbytes // 2)
    assert 18 <= fewer.config.num_hidden_layers <= 22
    with pytest.raises(RuntimeError, match="three layers"):
        gpu_whole.fitting(random, 1 << 30)
