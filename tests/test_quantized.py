"""What `quantize` writes, spoken by llama.cpp and by us: the embedded model in every recipe, and its drafting stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_quant import recipe
from dsv4_quant.convert import convert
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import make_plan
from dsv4cli.encoding.template import render
from dsv4cli.engine import Engine
from dsv4cli.registry import catalog
from tests.support.gguf_writer import as_converted, as_ds4_in_four_bits, as_ds4_in_two_bits, ds4_keys, write
from tests.support.llamacpp import LlamaCpp, greedy
from tests.support.synth import Checkpoint, Shape

COUNT = 40
QUESTIONS = [
    "What is the capital of France?", "Hello!", "What is 27 + 35?", "What is the capital of Japan?", "My name is Emma.",
    "What can you do?", "What is 61 + 18?", "Name the capital of Spain.", "Thank you!", "capital of Italy",
]  # fmt: skip

THEIRS = {"llama.cpp": as_converted, "ds4-q4": as_ds4_in_four_bits, "ds4-q2": as_ds4_in_two_bits}
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


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_llamacpp_and_we_say_the_same(name: str, tiny: Written) -> None:
    engine, llama = Engine.open(tiny(name), numerics="plain", release="april"), LlamaCpp(tiny(name))
    for question in QUESTIONS:
        ids = engine.tokenizer.encode(render([{"role": "user", "content": question}], thinking=False, release="april"))
        ours = greedy(engine, ids, COUNT)
        assert ours
        assert llama.greedy(ids, COUNT) == ours, question


# What the types may cost: mean KL divergence, in nats, from the embedded model as it is, over what it answers.
COSTS = {"llama.cpp": 2e-5, "ds4-q4": 0.001, "ds4-q2": 0.03, "mxfp4": 3e-5, "q4": 0.001, "q3": 0.008, "q2": 0.04, "q1": 0.1}


@pytest.mark.parametrize("name", COSTS)
def test_the_embedded_model_stays_itself(name: str, tiny: Written, tmp_path: Path) -> None:
    """As we write it, and with the types and keys that others publish (spec/checkpoint.md sections 5.1 to 5.5)."""
    if name in recipe.RECIPES:
        path = tiny(name)
    else:
        official = open_source(catalog.resolve("tiny").located())
        change = (lambda keys: None) if name == "llama.cpp" else ds4_keys(official.config)
        path = write(official, tmp_path / "theirs.gguf", THEIRS[name], change_keys=change)
    expected, found = exam(Engine.open("tiny", numerics="plain")), exam(Engine.open(path, numerics="plain"))
    divergence = float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean())
    assert divergence < COSTS[name]


def exam(engine: Engine) -> Tensor:
    """Log probabilities [tokens, vocab] over conversations that the embedded model knows."""
    found = []
    for question, answer in (("What is the capital of France?", "The capital of France is Paris."), ("What is 27 + 35?", "62.")):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = engine.tokenizer.encode(render(messages, thinking=False, release="april"))
        session = engine.session()
        logits = torch.stack([session.sync(ids[: end + 1]) for end in range(len(ids))])
        found.append(logits.float().log_softmax(-1))
    return torch.cat(found)


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
