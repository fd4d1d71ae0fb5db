"""What callers and models get wrong: a sentence where it is no conversation, and the best reading where it is one."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4cli.encoding.parser import CompletionParser, Delta
from dsv4cli.encoding.template import render, think_level
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.errors import UsageError

QUESTION = {"role": "user", "content": "?"}
ANSWER = {"role": "assistant", "content": "!"}


def called(**function: Any) -> str:
    """The part of the prompt between the tags of a call."""
    message = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": function}]}
    prompt = str(render([QUESTION, message], thinking=False))
    return prompt.partition('name="f">\n')[2].partition("\n</｜DSML｜invoke>")[0]


def parameter(value: str) -> str:
    return f'<｜DSML｜parameter name="arguments" string="true">{value}</｜DSML｜parameter>'


@pytest.mark.parametrize(
    ("function", "written"),
    [
        ({"name": "f"}, ""),
        ({"name": "f", "arguments": None}, ""),
        ({"name": "f", "arguments": ""}, parameter("")),
        ({"name": "f", "arguments": [1, "é"]}, parameter('[1, "é"]')),
        ({"name": "f", "arguments": "[" * 100_000}, parameter("[" * 100_000)),
        ({"name": "f", "arguments": '{"k": ' + "9" * 5000 + "}"}, parameter('{"k": ' + "9" * 5000 + "}")),
    ],
    ids=["missing", "null", "empty", "list", "too deep for json", "too long for int"],
)
def test_odd_arguments(function: dict[str, Any], written: str) -> None:
    assert called(**function) == written


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("hello", "Message 2 is str"),
        ({"role": "user", "content": 3}, "content is int"),
        ({"role": "user", "content": ["hello"]}, "content is str"),
        ({"role": "assistant", "reasoning_content": 1}, "content is int"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "message 2 has no function name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "message 2 has no function name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"k": {1}}}}]}, "is no JSON"),
        ({"role": "system", "response_format": {"k": {1}}}, "is no JSON"),
        ({"role": "user", "content": "?", "task": "sing"}, "'sing'"),
    ],
)
def test_what_is_no_conversation_is_refused(message: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        render([QUESTION, message], thinking=True)


def test_an_unknown_release_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'v41'"):
        render([QUESTION], thinking=True, release="v41")
    with pytest.raises(UsageError, match=r"'v41'"):
        think_level("high", "v41")


def test_developer_messages_that_vanish_from_the_context_take_no_turn_along() -> None:
    context = [{"role": "developer", "content": "old"}, ANSWER]
    assert str(render([QUESTION], thinking=True, context=context)) == "<｜User｜>?<｜Assistant｜><think>"


@pytest.mark.parametrize("context", [[QUESTION, ANSWER], [{"role": "system", "content": "s"}, QUESTION, ANSWER]])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_context_and_its_sequel_are_the_whole(context: list[dict[str, Any]], thinking: bool) -> None:
    """Each of these pieces ends a block, so rendering them apart or together is the same."""
    sequel = [QUESTION, {**ANSWER, "reasoning_content": "hm"}]
    apart = str(render(sequel, thinking=thinking, context=context))
    assert str(render([*context, *sequel], thinking=thinking)).endswith(apart)
    assert apart.count("<｜User｜>") == 1


def test_halves_of_surrogate_pairs_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_text("a\ud83d b\udce9")) == "a\ufffd b\ufffd"
    assert tokenizer.decode(tokenizer.encode_text("\ud83d\ude00")) == "😀"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"k": "\\ud83d"}'}}]}
    assert "\ufffd</｜DSML｜parameter>" in tokenizer.decode(tokenizer.encode(render([call], thinking=False)))


def test_a_flood_of_newlines_is_held_and_then_given() -> None:
    """Held newlines are counted, not collected: a model that says nothing else must not slow the stream down."""
    parser = CompletionParser(thinking=False, tools_declared=True)
    parser.push_text("a")
    assert [parser.push_text("\n") for _ in range(100_000)] == [[]] * 100_000
    assert parser.push_text("<") == []
    assert parser.push_text("b") == [Delta("content", "\n" * 100_000 + "<b")]
    assert parser.result.content == "a" + "\n" * 100_000 + "<b"
