"""`dsv4 eval kld`: what a quantisation costs, on the embedded model; the arithmetic against logits computed apart from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_quant.files import open_source
from dsv4cli import paths
from dsv4cli.engine import Engine, divergence, evaluate
from dsv4cli.errors import CapacityError, UsageError
from dsv4cli.registry import catalog
from tests.support.gguf_writer import Kind, write
from tests.support.program import Outcome

Run = Callable[..., Outcome]
WORDS = "Emma lives in Paris. The capital of France is Paris. What is 27 + 35? It is 62. " * 8


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny with its matrices as Q8_0, and as Q4_0."""
    source = open_source(catalog.resolve("tiny").located())
    folder = tmp_path_factory.mktemp("lossy")
    return {kind.name: write(source, folder / f"{kind.name}.gguf", kind) for kind in (Kind.Q8_0, Kind.Q4_0)}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text(WORDS, encoding="utf-8")
    return path


def measured(run: Run, *arguments: str) -> dict[str, Any]:
    shown = run("eval", "kld", *arguments, "--json")
    assert shown.code == 0, shown.err
    told: dict[str, Any] = json.loads(shown.out)
    return told


def test_a_model_does_not_differ_from_itself(run_dsv4: Run, text: Path) -> None:
    told = measured(run_dsv4, "tiny", "--reference", "tiny", "--text", str(text), "--ctx", "96")
    assert [row["window"] for row in told["contexts"]] == [24, 96]
    for row in told["contexts"]:
        assert (row["kl"], row["kl_p99"], row["top1"]) == (0, 0, 1)
        assert row["perplexity"] == row["reference_perplexity"] > 1
    longer = run_dsv4("eval", "ppl", "tiny", "--text", str(text), "--ctx", "96", "--json")
    assert told["contexts"][1]["perplexity"] == pytest.approx(json.loads(longer.out)["perplexity"])


def test_fewer_bits_differ_more(run_dsv4: Run, text: Path, lossy: dict[str, Path]) -> None:
    rows = {kind: measured(run_dsv4, str(path), "--reference", "tiny", "--text", str(text), "--ctx", "128")["contexts"][-1]
            for kind, path in lossy.items()}
    assert 0 < rows["Q8_0"]["kl"] < 0.01 < rows["Q4_0"]["kl"]
    assert rows["Q8_0"]["kl"] < rows["Q8_0"]["kl_p99"] < rows["Q4_0"]["kl_p99"]
    assert rows["Q4_0"]["top1"] < rows["Q8_0"]["top1"]
    assert rows["Q8_0"]["top1"] > 0.95


def test_the_figures_are_those_of_the_logits(lossy: dict[str, Path]) -> None:
    """KL(reference || model) over whole matrices of logits at once, in numpy; a window that no chunk divides."""
    model, reference = Engine.open(lossy["Q4_0"]), Engine.open("tiny")
    ids = model.tokenizer.encode_text(WORDS)[:70]
    found = divergence.compare(model, reference, ids, 48, chunk=33)
    ours, theirs = (np.concatenate([logarithms(engine, piece) for piece in (ids[:47], ids[47:])])
                    for engine in (model, reference))
    kl = (np.exp(theirs) * (theirs - ours)).sum(1)
    assert found.tokens == 70
    assert found.kl == pytest.approx(kl.mean(), rel=1e-6)
    assert found.kl_error == pytest.approx(kl.std(ddof=1) / 70 ** 0.5, rel=1e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert found.top1 == (ours.argmax(1) == theirs.argmax(1)).mean()
    for logs, perplexity in ((ours, found.perplexity), (theirs, found.reference_perplexity)):
        assert perplexity == pytest.approx(np.exp(-logs[range(70), ids].mean()), rel=1e-6)


def logarithms(engine: Engine, piece: list[int]) -> np.ndarray[Any, Any]:
    """log p [len(piece), vocab] in float64 for the tokens after BOS and those before them; chunks as in the comparison."""
    chunks = (evaluate.logits_of(engine, [engine.config.bos_token_id, *piece[:-1]], chunk=32))
    logits = torch.cat(list(chunks)).double().numpy()
    found: np.ndarray[Any, Any] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return found


def test_the_table(run_dsv4: Run, text: Path) -> None:
    shown = run_dsv4("eval", "kld", "tiny", "--reference", "tiny", "--text", str(text), "--ctx", "64")
    lines = shown.out.splitlines()
    assert lines[0].split()[:2] == ["context", "tokens"]
    assert [line.split()[0] for line in lines[1:]] == ["16", "64"]
    assert all(line.endswith("100.00%") for line in lines[1:])


def test_nothing_is_left_in_the_cache(run_dsv4: Run, text: Path) -> None:
    measured(run_dsv4, "tiny", "--reference", "tiny", "--text", str(text), "--ctx", "64")
    assert [file.name for file in paths.cache().iterdir()] == ["usage.json"]  # when models were last used


def test_the_text_that_comes_with_dsv4_is_long_enough_for_two_contexts() -> None:
    text = paths.bundled("evaluation.txt").read_text(encoding="utf-8")
    assert divergence.windows_for(2048, len(Engine.open("tiny").tokenizer.encode_text(text))) == [512, 2048]


def test_a_short_text_shortens_the_context() -> None:
    assert divergence.windows_for(2048, 3000) == [512, 2048]
    assert divergence.windows_for(2048, 600) == [512, 601]
    assert divergence.windows_for(64, 3000) == [16, 64]
    assert divergence.windows_for(2048, 1) == [2]


def test_models_of_other_tokens(text: Path) -> None:
    tiny = Engine.open("tiny")

    class Other:
        name, config = "other", tiny.config

        class tokenizer:  # noqa: N801 - stands where an instance would
            @staticmethod
            def encode_text(text: str) -> list[int]:
                return [1, 2, 3]

    with pytest.raises(UsageError, match="tiny and other do not have the same tokens"):
        divergence.encoded(tiny, Other(), WORDS)  # type: ignore[arg-type]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Engine.open("tiny")
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(divergence.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CapacityError, match=r"take 1\.\d MB, but .* has only 1\.0 MB free"):
        divergence.compare(tiny, tiny, tiny.tokenizer.encode_text(WORDS), 256)


@pytest.mark.parametrize(("more", "sentence"), [
    (("--text", "nowhere"), "nowhere cannot be read"),
    (("--text", "-"), "The text is empty"),
    (("--reference", "tiyn"), "tiyn"),
    (("--ctx", "1"), "Windows of"),
])
def test_what_cannot_be_compared(run_dsv4: Run, more: tuple[str, ...], sentence: str) -> None:
    shown = run_dsv4("eval", "kld", "tiny", "--reference", "tiny", *more)
    assert (shown.code, shown.out) == (2, "")
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 2
