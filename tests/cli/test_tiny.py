"""The commands over the embedded model: nothing faked from the command line to the weights.

What tiny says is up to its training; these tests ask only for what holds of any weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dsv4cli import paths
from dsv4cli.engine import opening
from tests.support.program import Outcome
from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
SHORT = ("--temp", "0", "--think", "off", "--max-tokens", "8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of tiny that may be harmed."""
    return shutil.copytree(paths.bundled("tiny"), tmp_path / "copy")


def vocabulary() -> int:
    return int(json.loads((paths.bundled("tiny") / "config.json").read_text())["vocab_size"])


def test_list_and_show_find_it(run_dsv4: Run) -> None:
    entry = json.loads(run_dsv4("list", "--json").out)[0]
    assert (entry["name"], entry["release"], entry["license"]) == ("tiny", "april", "MIT")
    told = json.loads(run_dsv4("show", "tiny", "--json").out)
    assert told["path"] == entry["path"] == str(paths.bundled("tiny"))
    assert sum(part["nbytes"] for part in told["parts"]) < entry["bytes"] <= 12_000_000


def test_records_join_to_the_plain_answer(run_dsv4: Run) -> None:
    plain = run_dsv4("run", "Hello!", *SHORT)
    records = [json.loads(line) for line in run_dsv4("run", "Hello!", *SHORT, "--json").out.splitlines()]
    assert (plain.code, plain.err.count("\n")) in {(0, 0), (0, 1)}  # a note, if the answer was cut
    assert "".join(record["text"] for record in records).rstrip("\n") == plain.out.rstrip("\n")
    assert [record["index"] for record in records if record["id"] is not None] == list(range(records[-1]["index"] + 1))
    assert records[-1]["finish"] in ("stop", "length")
    assert all(record["prompt_tokens"] == records[0]["prompt_tokens"] > 3 for record in records)
    assert all(record["memory_bytes"] > 10_000_000 for record in records)


def test_the_same_model_by_path_says_the_same(run_dsv4: Run, copy: Path) -> None:
    assert run_dsv4("run", str(copy), "Hello!", *SHORT).out == run_dsv4("run", "tiny", "Hello!", *SHORT).out


def test_the_seed_decides(run_dsv4: Run) -> None:
    said = {seed: run_dsv4("run", "Tell me a story.", "--think", "off", "--max-tokens", "12", "--temp", "2", "--seed", seed).out
            for seed in ("1", "2", "3")}
    assert len(set(said.values())) > 1
    again = run_dsv4("run", "Tell me a story.", "--think", "off", "--max-tokens", "12", "--temp", "2", "--seed", "1")
    assert again.out == said["1"]


def test_thinking_goes_to_stderr_and_a_budget_ends_it(run_dsv4: Run) -> None:
    shown = run_dsv4("run", "What is 12 + 35?", "--temp", "0", "--think-budget", "2", "--json", "--max-tokens", "20")
    kinds = [json.loads(line)["kind"] for line in shown.out.splitlines()]
    assert kinds.count("reasoning") in (2, 3)
    assert kinds[-1] == "answer"


def test_chat_from_a_pipe(run_dsv4: Run) -> None:
    shown = run_dsv4("chat", "--temp", "0", "--max-tokens", "8", stdin=b"/think off\nHello!\n/status\n")
    assert shown.code == 0
    assert shown.out.rstrip("\n") == run_dsv4("run", "Hello!", *SHORT).out.rstrip("\n")
    assert "of 32,768 tokens used" in shown.err


def test_logits_are_a_float32_file(run_dsv4: Run, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("0 5\n6\t7 8\n")
    shown = run_dsv4("eval", "logits", "tiny", "--ids", str(tmp_path / "ids"), "--out", str(tmp_path / "a.npy"))
    logits = np.load(tmp_path / "a.npy")
    assert (shown.code, shown.out, logits.dtype, logits.shape) == (0, "", np.float32, (5, vocabulary()))
    assert np.isfinite(logits).all()
    run_dsv4("eval", "logits", "tiny", "--ids", "-", "--out", str(tmp_path / "b.npy"), stdin=b"0 5 6")
    assert np.allclose(np.load(tmp_path / "b.npy"), logits[:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("ids", "sentence"), [
    ("", "holds no token ids"), ("1 two 3", "holds 'two' as its word 2"), ("1 -2", "holds '-2' as its word 2"),
    ("0 99999", "99999 is outside the vocabulary"), ("0 1 2 3 4", "5 tokens do not fit into the context of 4")])
def test_ids_that_cannot_be_evaluated(run_dsv4: Run, tmp_path: Path, ids: str, sentence: str) -> None:
    (tmp_path / "ids").write_text(ids)
    shown = run_dsv4("eval", "logits", "tiny", "--ids", str(tmp_path / "ids"), "--out", str(tmp_path / "a.npy"), "--ctx", "4")
    assert (shown.code, list(tmp_path.glob("*.npy"))) == (2, [])
    assert sentence in shown.err


def test_perplexity(run_dsv4: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The capital of France is Paris. " * 8, encoding="utf-8")
    told = json.loads(run_dsv4("eval", "ppl", "tiny", "--text", str(tmp_path / "text"), "--ctx", "64", "--json").out)
    assert told["window"] == 64
    assert told["tokens"] > 60
    assert told["perplexity"] == pytest.approx(np.exp(told["nll"]))
    assert 1 < told["perplexity"] < vocabulary()
    assert run_dsv4("eval", "ppl", "tiny", "--text", str(tmp_path / "text"), "--ctx", "64").out.startswith(
        f"perplexity {told['perplexity']:.4f} ")


@pytest.mark.parametrize("content", [b"", b"caf\xe9"])
def test_texts_that_cannot_be_scored(run_dsv4: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    shown = run_dsv4("eval", "ppl", "tiny", "--text", str(tmp_path / "text"))
    assert (shown.code, shown.out) == (2, "")
    assert len(shown.err.splitlines()) == 2


def test_a_prompt_longer_than_the_context(run_dsv4: Run) -> None:
    shown = run_dsv4("run", "one two three " * 50, "--ctx", "20")
    assert (shown.code, shown.out) == (2, "")
    assert "do not fit into the context of 20." in shown.err


def test_a_model_larger_than_memory(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "available_memory", lambda: 20_000_000)
    monkeypatch.setattr(opening, "resident_bytes", lambda: 0)
    shown = run_dsv4("run", "hello")
    assert (shown.code, shown.out) == (3, "")
    assert "but only 20.0 MB are available" in shown.err
    assert "No context is short enough" in shown.err
    needs = json.loads(run_dsv4("plan", "tiny", "--ctx", "8192", "--json").out)
    monkeypatch.setattr(opening, "available_memory", lambda: needs["needed"] - needs["program"] + opening.LOADED_LATER + 10)
    shown = run_dsv4("run", "hello", "--ctx", "32768")
    assert (shown.code, shown.out) == (3, "")
    assert "hint: --ctx 8192 would fit." in shown.err


@pytest.mark.parametrize(("harm", "code"), [
    (lambda model: _cut(model / "model.safetensors"), 4),
    (lambda model: (model / "model.safetensors").unlink(), 4),
    (lambda model: (model / "tokenizer.json").unlink(), 4),
    (lambda model: (model / "tokenizer.json").write_text("{"), 4),
    (lambda model: (model / "config.json").write_text("{"), 4),
    (lambda model: (model / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'), 1),
    (lambda model: (model / "generation_config.json").write_text("["), 4),
])
def test_harmed_models_are_one_sentence(run_dsv4: Run, copy: Path, harm: Callable[[Path], object], code: int) -> None:
    harm(copy)
    shown = run_dsv4("run", str(copy), "hello")
    assert (shown.code, shown.out) == (code, "")
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) <= 2
    assert "unexpected" not in shown.err


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    started = Terminal(["-m", "dsv4cli", "chat", "tiny", "--temp", "0", "--stats"], env={"OMP_NUM_THREADS": "1"})
    yield started
    started.close()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
def test_a_conversation_in_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for_prompt()
    header = terminal.shown()
    assert all(word in header for word in ("model     tiny", "release   april", "numerics  official", "backend   "))
    terminal.type("/think off\r")
    terminal.wait_for("Thinking is off.")
    terminal.type("Hello!\r")
    terminal.wait_for("tok/s · answer")
    terminal.wait_for_prompt()
    terminal.type("/undo\r")
    terminal.wait_for("Taken back: Hello!")
    terminal.type("/status\r")
    terminal.wait_for("messages     0")
    terminal.type("/bye\r")
    assert terminal.wait_for_end() == 0
