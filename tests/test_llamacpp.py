"""llama.cpp reads what we say a GGUF is, and says what we say: the embedded model written as a GGUF, spoken by both."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4_quant.files import open_source
from dsv4cli.encoding.template import render
from dsv4cli.engine import Engine, Sampling
from dsv4cli.registry import catalog
from tests.support.gguf_writer import Kind, write
from tests.support.llamacpp import LlamaCpp, greedy

COUNT = 48
QUESTIONS = [
    "What is the capital of France?",
    "Hello!",
    "What is 27 + 35?",
    "What is the capital of Japan?",
    "My name is Emma.",
]


@pytest.fixture(scope="module", params=[Kind.BF16, Kind.Q8_0], ids=lambda kind: kind.name)
def tiny_gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(catalog.resolve("tiny").located())
    return write(source, tmp_path_factory.mktemp("gguf") / "tiny.gguf", request.param)


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path) -> Engine:
    return Engine.open(tiny_gguf, numerics="plain", release="april")


@pytest.fixture(scope="module")
def llama(tiny_gguf: Path) -> LlamaCpp:
    return LlamaCpp(tiny_gguf)


@pytest.mark.parametrize("thinking", [False, True], ids=["off", "high"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_both_say_the_same(engine: Engine, llama: LlamaCpp, question: str, thinking: bool) -> None:
    ids = engine.tokenizer.encode(render([{"role": "user", "content": question}], thinking=thinking, release="april"))
    ours = greedy(engine, ids, COUNT)
    assert ours
    assert llama.greedy(ids, COUNT) == ours


def test_a_gguf_brings_its_tokenizer_and_configuration(engine: Engine) -> None:
    official = Engine.open("tiny", numerics="plain")
    assert engine.config == official.config
    text = "Hello <｜User｜>, 12345 wörter\n\n你好 ｜DSML｜ </think>!"
    assert engine.tokenizer.encode_text(text) == official.tokenizer.encode_text(text)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    prompt = render(messages, thinking=True, effort="max", release="april")
    assert engine.tokenizer.encode(prompt) == official.tokenizer.encode(prompt)


def test_the_engine_chats_from_a_gguf(engine: Engine) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    answer = "".join(t.text for t in engine.chat(messages, think="off", sampling=Sampling(temperature=0)) if t.kind == "answer")
    assert "Paris" in answer
