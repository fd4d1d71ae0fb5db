"""What `quantize` writes, spoken by llama.cpp and by us: the embedded model in every recipe, and its drafting stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant import recipe
from dsv4_quant.convert import convert
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import make_plan
from dsv4cli.encoding.template import render
from dsv4cli.engine import Engine
from dsv4cli.registry import catalog
from tests.support.llamacpp import LlamaCpp
from tests.support.synth import Checkpoint, Shape

COUNT = 40
QUESTIONS = [
    "What is the capital of France?", "Hello!", "What is 27 + 35?", "What is the capital of Japan?", "My name is Emma.",
    "What can you do?", "What is 61 + 18?", "Name the capital of Spain.", "Thank you!", "capital of Italy",
]  # fmt: skip

Written = Callable[..., Path]


def quantized(source: Path, output: Path, name: str, **options: Any) -> Path:
    changes = recipe.rules_of(options.pop("changes", {}))
    plan = make_plan(read_header(source), output, recipe.named(name), Origin(output.stem), changes=changes, **options)
    convert(plan, open_source(source))
    return plan.parts[0].path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The embedded model in a recipe, written once."""
    folder = tmp_path_factory.mktemp("recipes")
    return cache(lambda name, stages="none": quantized(
        catalog.resolve("tiny").located(), folder / f"{stages}-{name}.gguf", name, stages=stages))


def greedy(engine: Engine, ids: list[int]) -> str:
    session, said = engine.session(), []
    logits = session.sync(ids)
    while len(said) < COUNT and (token := int(logits.argmax())) not in engine.tokenizer.stop_ids:
        said.append(token)
        logits = session.step(token)
    return engine.tokenizer.decode(said)


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_llamacpp_and_we_say_the_same(name: str, tiny: Written) -> None:
    engine, llama = Engine.open(tiny(name), numerics="plain", release="april"), LlamaCpp(tiny(name))
    for question in QUESTIONS:
        ids = engine.tokenizer.encode(render([{"role": "user", "content": question}], thinking=False, release="april"))
        ours = greedy(engine, ids)
        assert ours
        assert llama.greedy(ids, COUNT) == ours, question


def test_llamacpp_drafts_with_the_mtp_block(tiny: Written) -> None:
    """A block with wrong names or halves in the wrong order would draft nothing that holds; the text never changes."""
    plain = LlamaCpp(tiny("mxfp4"))
    drafting = LlamaCpp(tiny("mxfp4"), drafter=tiny("mxfp4", "mtp"), kind="MTP")
    engine = Engine.open(tiny("mxfp4"))
    drafted = accepted = 0
    for question in QUESTIONS[:4]:
        ids = engine.tokenizer.encode(render([{"role": "user", "content": question}], thinking=True, release="april"))
        assert drafting.greedy(ids, COUNT) == plain.greedy(ids, COUNT)
        made, right = drafting.drafted(ids, COUNT)
        drafted, accepted = drafted + made, accepted + right
    assert drafted > 40
    assert accepted > 0.5 * drafted


def test_llamacpp_loads_dspark_stages(tmp_path: Path) -> None:
    """Random ones: it says the same with them as without, having drafted."""
    folder = Checkpoint(Shape(stages=3, dspark=True, width=256, vocab=1700), seed=5).write(tmp_path / "random")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(catalog.resolve("tiny").located() / name, folder / name)
    trunk, drafter = (quantized(folder, tmp_path / f"{stages}.gguf", "mxfp4", stages=stages) for stages in ("none", "dspark"))
    plain, drafting = LlamaCpp(trunk), LlamaCpp(trunk, drafter=drafter, kind="DSPARK")
    ids = list(range(5, 40))
    assert drafting.greedy(ids, 12) == plain.greedy(ids, 12)
    assert drafting.drafted(ids, 12)[0] >= 10
