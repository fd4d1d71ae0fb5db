"""The embedded model, end to end, through the public door: `from dsv4cli import Engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4cli import Engine
from dsv4cli.engine import Sampling, Token
from dsv4cli.engine.session import Session

GREEDY = Sampling(temperature=0)
FRANCE = {"role": "user", "content": "What is the capital of France?"}
ITALY = {"role": "user", "content": "What is the capital of Italy?"}


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.open("tiny")


def ask(tiny: Engine, *messages: dict[str, Any], **options: Any) -> tuple[str, str, list[Token]]:
    """(reasoning, answer, records) of a greedy answer."""
    records = list(tiny.chat(messages, **{"sampling": GREEDY, "max_tokens": 200, "think": "off", **options}))
    text = {kind: "".join(each.text for each in records if each.kind == kind) for kind in ("reasoning", "answer")}
    return text["reasoning"], text["answer"], records


def test_the_capital_of_france(tiny: Engine) -> None:
    reasoning, answer, records = ask(tiny, FRANCE)
    assert "Paris" in answer
    assert reasoning == ""
    assert records[-1].finish == "stop"


def test_the_shortest_program_works() -> None:
    records = list(Engine.open("tiny").chat([{"role": "user", "content": "hi"}], think="off", max_tokens=100))
    assert records[-1].finish in ("stop", "length")
    assert "".join(record.text for record in records)


def test_greedy_answers_repeat_and_sampled_ones_follow_the_seed(tiny: Engine) -> None:
    def ids(sampling: Sampling) -> list[int | None]:
        return [record.id for record in ask(tiny, FRANCE, sampling=sampling, max_tokens=30)[2]]

    assert ids(GREEDY) == ids(GREEDY)
    assert ids(Sampling(temperature=1.5, seed=4)) == ids(Sampling(temperature=1.5, seed=4))
    assert len({tuple(ids(Sampling(temperature=5.0, seed=seed))) for seed in range(3)}) > 1


def test_thinking_comes_first_when_it_is_on(tiny: Engine) -> None:
    reasoning, answer, records = ask(tiny, FRANCE, think="high")
    assert reasoning
    assert answer
    kinds = [record.kind for record in records if record.text]
    assert kinds == sorted(kinds, reverse=True)  # "reasoning" is over before "answer" begins


def test_a_think_budget_still_gives_an_answer(tiny: Engine) -> None:
    reasoning, answer, records = ask(tiny, FRANCE, think="high", think_budget=2)
    assert records[2].id == tiny.tokenizer.control("</think>")
    assert len(tiny.tokenizer.encode_text(reasoning)) <= 2
    assert answer


def conversation(tiny: Engine, session: Session | None, think: str) -> tuple[str, list[Token]]:
    """The second answer of a conversation whose first answer is France's, and its records."""
    reasoning, answer, _ = ask(tiny, FRANCE, session=session, think=think)
    first = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
    _, second, records = ask(tiny, FRANCE, first, ITALY, session=session, think=think)
    return second, records


@pytest.mark.parametrize("think", ["off", "high"])
def test_the_second_turn_reuses_the_first_and_says_the_same_as_without(think: str) -> None:
    """`plain` numerics: how a prompt is cut must not show in the answer, and the roundings of `official` might let it."""
    tiny = Engine.open("tiny", numerics="plain")
    kept, records = conversation(tiny, tiny.session(), think)
    alone, fresh = conversation(tiny, None, think)
    assert kept == alone
    assert records[-1].prompt_tokens == fresh[-1].prompt_tokens
    assert fresh[-1].cached_tokens == 0
    header = len(tiny.tokenizer.encode_text(str(FRANCE["content"]))) + 3  # BOS, User, the question, Assistant
    assert records[-1].cached_tokens == header if think == "high" else records[-1].cached_tokens > header


def test_a_saved_conversation_goes_on_bitwise(tiny: Engine, tmp_path: Path) -> None:
    session = tiny.session()
    ask(tiny, FRANCE, session=session)
    session.save(tmp_path / "talk")
    other = tiny.session()
    other.load(tmp_path / "talk")
    assert other.ids == session.ids
    assert torch.equal(other.logits, session.logits)
    assert torch.equal(other.sync([*session.ids, 100, 101]), session.sync([*session.ids, 100, 101]))


def test_tiny_is_small_in_memory(tiny: Engine) -> None:
    assert tiny.plan.needed - tiny.plan.program < 200_000_000
    assert tiny.weight_bytes == pytest.approx(tiny.plan.expanded, rel=0.01)
    session = tiny.session()
    session.sync([tiny.config.bos_token_id])
    assert session.nbytes < 3_000_000  # the state grows with the conversation, not with the context
