"""`dsv4 quantize` as it is typed: what it prints, what it refuses, and that it can be stopped."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
import torch

from dsv4_kernels import backends
from dsv4_quant import convert, imatrix, schema
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.imatrix import Entry
from dsv4_quant.metadata import QUALITY
from dsv4cli.commands import arguments
from dsv4cli.engine import quality
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog
from tests.support.program import Outcome, environment
from tests.support.synth import Checkpoint, Shape

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(Shape(stages=1), seed=1).write(tmp_path_factory.mktemp("models") / "random")


def test_tiny_becomes_a_model_that_answers(run_dsv4: Run, tmp_path: Path) -> None:
    done = run_dsv4("quantize", "tiny", "-o", str(tmp_path), "--recipe", "mxfp4")
    path = tmp_path / "tiny-MXFP4.gguf"
    assert done.code == 0, done.err
    assert str(path) in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    answer = run_dsv4("run", str(path), "What is the capital of France?", "--think", "off", "--temp", "0", "-q")
    assert answer.out.strip() == "The capital of France is Paris."
    shown = run_dsv4("show", str(path))
    assert "mxfp4 100 %" in shown.out


def test_a_dry_run_prints_the_plan_and_writes_nothing(run_dsv4: Run, source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", str(source), "-o", str(tmp_path / "o.gguf"), "--recipe", "mxfp4", "--attention", "f16", "--dry-run")
    shown = run_dsv4(*arguments)
    assert shown.code == 0
    rows = {line.split("   ")[0].strip(): line for line in shown.out.splitlines()}
    assert rows["attention"].split()[2:4] == ["fp8_e4m3", "f16"]
    assert rows["experts gate, up"].split()[4:6] == ["fp4", "mxfp4"]
    assert rows["experts down"].split()[-1] == "4.25"
    told = json.loads(run_dsv4(*arguments, "--json").out)
    assert told["bytes"] == sum(file["bytes"] for file in told["files"])
    assert told["roles"][-1]["bytes"] == sum(tensor["bytes"] for tensor in told["tensors"])
    assert {tensor["to"] for tensor in told["tensors"] if "attn_q_b" in tensor["name"]} >= {"f16"}
    assert list(tmp_path.iterdir()) == []


def test_stages_and_parts_are_named_as_others_expect(run_dsv4: Run, source: Path, tmp_path: Path) -> None:
    assert run_dsv4("quantize", str(source), "-o", str(tmp_path), "--recipe", "mxfp4", "--mtp").code == 0
    assert (tmp_path / "mtp-random-MXFP4.gguf").is_file()
    split = run_dsv4("quantize", str(source), "-o", str(tmp_path / "s.gguf"), "--recipe", "mxfp4", "-q",
                     "--split-max-size", "2MB")
    assert split.code == 0
    assert split.err == ""
    first, *more = sorted(tmp_path.glob("s-*.gguf"))
    assert more
    assert len(read_header(first).tensors) == len(read_header(_whole(run_dsv4, source, tmp_path)).tensors)


def _whole(run_dsv4: Run, source: Path, folder: Path) -> Path:
    assert run_dsv4("quantize", str(source), "-o", str(folder / "w.gguf"), "--recipe", "mxfp4", "-q").code == 0
    return folder / "w.gguf"


def test_a_name_of_our_own_is_kept_through_a_gguf(run_dsv4: Run, source: Path, tmp_path: Path) -> None:
    first = _whole(run_dsv4, source, tmp_path)
    assert read_header(first).metadata["general.name"] == "random"
    assert run_dsv4("quantize", str(first), "-o", str(tmp_path / "x.gguf"), "--recipe", "mxfp4", "--down", "f16", "-q").code == 0
    again = read_header(tmp_path / "x.gguf").metadata
    assert again["general.name"] == "random"
    assert again["dsv4.recipe"] == "mxfp4 --down f16"


def test_an_importance_matrix_is_used_and_named(run_dsv4: Run, tmp_path: Path) -> None:
    config = read_header(catalog.resolve("tiny").located()).config
    draw = torch.Generator().manual_seed(1)
    entries = {spec.name: Entry(torch.rand(math.prod(spec.shape[:-2]), spec.shape[-1], generator=draw),
                                torch.ones(math.prod(spec.shape[:-2])))
               for spec in schema.gguf_tensors(config) if len(spec.shape) > 1}
    imatrix.write(tmp_path / "i.gguf", entries, datasets=["chat"], chunks=3, chunk_size=512)
    common = ("quantize", "tiny", "--recipe", "q2", "-o")
    with_it = run_dsv4(*common, str(tmp_path / "with.gguf"), "--imatrix", str(tmp_path / "i.gguf"))
    without = run_dsv4(*common, str(tmp_path / "without.gguf"))
    assert (with_it.code, without.code) == (0, 0)
    assert "Without --imatrix" in without.err
    assert "Without --imatrix" not in with_it.err
    one, other = (open_source(tmp_path / name).read("layers.1.ffn.experts.0.w2.weight") for name in ("with.gguf", "without.gguf"))
    assert not torch.equal(one.data, other.data)
    said = read_header(tmp_path / "with.gguf").metadata
    assert (said["quantize.imatrix.file"], said["quantize.imatrix.chunks_count"]) == ("i.gguf", 3)
    assert "weights" in read_header(tmp_path / "without.gguf").metadata["quantize.imatrix.dataset"]


def test_an_importance_matrix_of_another_model(run_dsv4: Run, source: Path, tmp_path: Path) -> None:
    entries = {"blk.0.attn_q_a.weight": Entry(torch.ones(1, 128), torch.ones(1))}
    imatrix.write(tmp_path / "i.gguf", entries, datasets=[], chunks=1, chunk_size=1)
    refused = run_dsv4("quantize", str(source), "-o", str(tmp_path / "o.gguf"), "--recipe", "mxfp4",
                       "--imatrix", str(tmp_path / "i.gguf"))
    assert refused.code == 2
    assert "blk.0.attn_q_a.weight is 1 x 128" in refused.err
    assert not (tmp_path / "o.gguf").exists()


def test_small_types_can_be_read_again_but_not_onto_themselves(run_dsv4: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "q2.gguf", tmp_path / "q1.gguf"
    assert run_dsv4("quantize", "tiny", "-o", str(first), "--recipe", "q2", "-q").code == 0
    again = run_dsv4("quantize", str(first), "-o", str(second), "--recipe", "q1", "-q")
    assert again.code == 0, again.err
    one, other = (open_source(path).read("layers.1.ffn.experts.0.w1.weight") for path in (first, second))
    assert (one.format, other.format) == ("iq2_xxs", "iq1_m")
    difference = (one.float() - other.float()).square().mean() / one.float().square().mean()
    assert difference < 0.25
    before = first.read_bytes()
    refused = run_dsv4("quantize", str(first), "-o", str(first), "--recipe", "q1", "--force", "-q")
    assert refused.code == 2
    assert "is what is being read" in refused.err
    assert first.read_bytes() == before


def test_check_puts_the_quality_on_the_label(run_dsv4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "evaluation_text", lambda: "The capital of France is Paris. " * 12)
    done = run_dsv4("quantize", "tiny", "-o", str(tmp_path / "t.gguf"), "--recipe", "q2", "--check", "-q")
    assert done.code == 0, done.err
    said = json.loads(read_header(tmp_path / "t.gguf").metadata[QUALITY])
    assert said["reference"] == "tiny"
    assert 0 < said["contexts"][0]["kl"] < 1
    assert "KL mean" in done.out
    assert "t.gguf" in (tmp_path / "README.md").read_text(encoding="utf-8")
    refused = run_dsv4("quantize", "tiny", "-o", str(tmp_path / "m.gguf"), "--recipe", "q2", "--check", "--mtp")
    assert refused.code == 2
    assert "drafting stages" in refused.err


def test_a_check_that_was_stopped_goes_on(run_dsv4: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is finished then; it is measured and not written again."""
    path = tmp_path / "t.gguf"
    command = ("quantize", "tiny", "-o", str(path), "--recipe", "q2", "--check")

    def press(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quality, "check", press)
        stopped = run_dsv4(*command)
    assert stopped.code == 130
    assert f"The same command goes on with {path}." in stopped.err
    monkeypatch.setattr(quality, "evaluation_text", lambda: "The capital of France is Paris. " * 12)
    monkeypatch.setattr(convert, "encode_piece", press)
    other = run_dsv4(*command[:-1], "--down", "q3_k", "--check", "-q")
    assert other.code == 2
    assert "with other options" in other.err
    done = run_dsv4(*command, "-q")
    assert done.code == 0, done.err
    assert json.loads(read_header(path).metadata[QUALITY])["reference"] == "tiny"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "README.md"}
    again = run_dsv4(*command, "-q")
    assert "exists already" in again.err


@pytest.mark.parametrize(("options", "code", "message", "hint"), [
    ((), 2, "There is no recipe.", "--target-size"),
    (("--recipe", "q22"), 2, "no recipe called q22", "q2"),
    (("--recipe", "mxfp4", "--down", "q8"), 2, "no type called q8", "q8_0"),
    (("--recipe", "mxfp4", "--downn", "q8_0"), 2, "No such option: --downn", "--down"),
    (("--recipe", "mxfp4", "--dspark"), 1, "has mtp stages, not dspark", "--mtp"),
    (("--recipe", "q2",), 2, "no whole blocks of q2_k", "--down"),
    (("--recipe", "mxfp4", "--down", "q8_0,9=f16"), 2, "--down: there is no layer 9", "among these"),
    (("--target-size", "1KB"), 2, "1,000 bytes are too few", "larger --target-size"),
    (("--target-size", "plenty"), 2, "--target-size plenty: that is no size", "80GB"),
    (("--recipe", "mxfp4", "--workers", "0"), 2, "--workers 0", "Leave it out"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_wrong_use(options: tuple[str, ...], code: int, message: str, hint: str, run_dsv4: Run, source: Path,
                   tmp_path: Path) -> None:
    refused = run_dsv4("quantize", str(source), "-o", str(tmp_path / "o.gguf"), *options)
    assert refused.code == code
    error, advice = refused.err.strip().split("\n")[-2:]
    assert message in error
    assert hint in advice
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("out", "message"), [
    ("model.bin", "neither a folder nor the name of a .gguf file"), ("nowhere/model.gguf", "There is no folder")])
def test_outputs_that_cannot_be(out: str, message: str, run_dsv4: Run, source: Path, tmp_path: Path) -> None:
    refused = run_dsv4("quantize", str(source), "-o", str(tmp_path / out), "--recipe", "mxfp4")
    assert refused.code == 2
    assert message in refused.err


def test_ctrl_c_says_how_to_go_on(run_dsv4: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", press)
        stopped = run_dsv4("quantize", str(source), "-o", str(tmp_path / "o.gguf"), "--recipe", "mxfp4")
    assert stopped.code == 130
    assert f"The same command goes on with {tmp_path / 'o.gguf'}." in stopped.err


@pytest.mark.parametrize(("text", "size"), [
    ("80GB", 80 * 10**9), ("74.5GiB", int(74.5 * 2**30)), ("4096", 4096), ("2 m", 2 * 10**6)])
def test_sizes(text: str, size: int) -> None:
    assert arguments.size_of(text, "--target-size") == size


@pytest.mark.parametrize("text", ["", "0", "-3GB", "8XB", "GB", "nan", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError):
        arguments.size_of(text, "--target-size")


@pytest.mark.skipif(sys.platform == "win32", reason="no signals of that kind")
def test_a_real_ctrl_c_while_it_works(source: Path, tmp_path: Path) -> None:
    """The signal reaches the process in the middle of its work; the same command then finishes."""
    slow = ("import signal, time; from dsv4_quant import quantize, convert; one = convert.encode_piece\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in whatever a shell starts in the background
            "def late(*a): time.sleep(0.02); return one(*a)\n"
            "convert.encode_piece = late; from dsv4cli import cli; cli.main()")
    command = [sys.executable, "-c", slow, "quantize", str(source), "-o", "out.gguf", "--recipe", "mxfp4"]
    child = subprocess.Popen(command, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "out.gguf.part").exists() and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "The same command goes on" in said
    assert "Traceback" not in said
    finished = subprocess.run([*command[:2], "from dsv4cli import cli; cli.main()", *command[3:]], cwd=tmp_path, timeout=60,
                              env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_a_bar(source: Path, tmp_path: Path) -> None:
    child = pexpect.spawn(sys.executable, ["-m", "dsv4cli", "quantize", str(source), "-o", "out.gguf", "--recipe", "mxfp4"],
                          cwd=str(tmp_path), env=environment(OMP_NUM_THREADS="1", TERM="xterm-256color"), dimensions=(30, 120),
                          encoding="utf-8", timeout=60)
    child.expect(r"blk\.\d+|token_embd|output")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "100 %" in (child.before or "")


CUT_SHORT = """
import contextlib, os, sys
from dsv4cli import cli
from dsv4cli.commands import quantize_view as view

@contextlib.contextmanager
def reporting(quiet):
    yield lambda done, total, name: os.truncate(sys.argv[1], 4096)

view.reporting = reporting
cli.main(["quantize", os.path.dirname(sys.argv[1]), "-o", sys.argv[2], "--recipe", "mxfp4", "--workers", "1", "-q"])
"""


@pytest.mark.skipif(sys.platform == "win32" or backends.cpu_trouble() is not None, reason="nobody watches here")
def test_a_source_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    """Not a signal, and nothing that was made of zeros counts as done."""
    folder = Checkpoint(Shape(stages=1), seed=1).write(tmp_path / "random")
    (weights,) = folder.glob("*.safetensors")
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, str(weights), str(tmp_path / "o.gguf")], capture_output=True,
                          text=True, env=environment(), timeout=100)
    assert (done.returncode, done.stdout) == (4, "")
    assert f"{weights} was cut short while it was in use" in done.stderr
    assert not (tmp_path / "o.gguf").exists()
    assert len((tmp_path / "o.gguf.journal").read_text().splitlines()) == 1  # the work's name alone
