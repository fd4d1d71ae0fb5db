"""A quantised file is compared with its source, and says so afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_quant.convert import convert
from dsv4_quant.errors import WrongUse
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import make_plan
from dsv4_quant.recipe import named
from dsv4_quant.report import Described
from dsv4cli.engine import Engine, quality
from dsv4cli.engine.divergence import Divergence
from dsv4cli.registry import catalog
from tests.support.gguf_writer import Kind, write

WORDS = "Emma lives in Paris. The capital of France is Paris. What is 27 + 35? It is 62. " * 4


def test_a_checked_file_says_what_it_costs(tmp_path: Path) -> None:
    source, path = catalog.resolve("tiny").located(), tmp_path / "tiny-q4.gguf"
    plan = make_plan(read_header(source), path, named("q4"), Origin("tiny", license="MIT", recipe="q4"))
    convert(plan, open_source(source))
    before = path.stat().st_size
    found = quality.check(path, "tiny", text=WORDS, ctx=96)
    assert [each.window for each in found] == [24, 96]
    assert all(0 < each.kl < 0.2 and each.top1 > 0.8 for each in found)
    said = Described.of(path).quality
    assert said is not None
    assert (said["reference"], said["text"], path.stat().st_size) == ("tiny", "a text of its own", before)
    for figures, each in zip(said["contexts"], found, strict=True):
        assert {key: pytest.approx(value, rel=1e-7) for key, value in figures.items()} == vars(each)
    assert f"| `tiny-q4.gguf` | 96 | {found[1].perplexity:.4f} |" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert Engine.open(path).config == Engine.open("tiny").config  # it is still a model


def test_a_file_of_somebody_else_has_no_room_for_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(open_source(catalog.resolve("tiny").located()), tmp_path / "tiny.gguf", Kind.Q8_0)
    monkeypatch.setattr(Engine, "open", lambda *given: pytest.fail("found out too late"))
    with pytest.raises(WrongUse, match="has no key"):
        quality.check(path, "tiny", text=WORDS, ctx=32)
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.gguf"]


def test_progress_is_told(tmp_path: Path) -> None:
    source, path = catalog.resolve("tiny").located(), tmp_path / "a.gguf"
    convert(make_plan(read_header(source), path, named("mxfp4"), Origin("tiny", recipe="mxfp4")), open_source(source))
    told: list[tuple[int, int]] = []
    found = quality.check(path, "tiny", text=WORDS[:90], ctx=16, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] == found[-1].tokens
    assert isinstance(found[0], Divergence)
    assert found[-1].kl < 0.05
