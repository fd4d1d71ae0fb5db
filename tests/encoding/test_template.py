"""Messages to prompts: every golden prompt to the byte, its control ranges and its ids; and no way in for injections."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4cli.encoding import texts
from dsv4cli.encoding.segments import Control, Rendered, Text
from dsv4cli.encoding.template import render, think_level
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.errors import UsageError
from tests.encoding.conftest import Case, cases

# What the project does otherwise than the script of April 2026, on purpose; each has a test of its own below.
DEVIATIONS = {"args_dict_instead_of_string", "args_json_array", "blocks_user_content_list"}


def rendered(case: Case, **options: Any) -> Rendered:
    return render(
        case["messages"],
        thinking=case["thinking_mode"] == "thinking",
        effort=case["reasoning_effort"],
        release=case["release"],
        tools=case["tools"],
        drop_thinking=case["drop_thinking"],
        context=case.get("context"),
        bos=case.get("add_default_bos_token", True),
        **options,
    )


def assert_golden(prompt: Rendered, case: Case, tokenizer: Tokenizer) -> None:
    assert str(prompt) == case["expected_prompt"]
    assert [list(span) for span in prompt.control_ranges] == case["control_ranges"]
    ids = tokenizer.encode(prompt)
    assert len(ids) == case["token_count"]
    assert hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest() == case["token_ids_sha256"]
    if "token_ids" in case:
        assert ids == case["token_ids"]


def answered(case: Case) -> bool:
    return case["expected_prompt"] is not None and case["id"] not in DEVIATIONS


def refused(case: Case) -> bool:
    return case["expected_prompt"] is None and case["id"] not in DEVIATIONS


@cases("encode_open", answered)
def test_april_prompt(case: Case, tokenizer: Tokenizer) -> None:
    assert_golden(rendered(case), case, tokenizer)


@cases("encode_0731_open", answered)
def test_0731_prompt(case: Case, tokenizer: Tokenizer) -> None:
    assert_golden(rendered(case), case, tokenizer)


@cases("encode_open", refused)
def test_what_april_refuses_is_refused(case: Case) -> None:
    with pytest.raises(UsageError):
        rendered(case)


@cases("encode_open", lambda case: case["id"] == "args_dict_instead_of_string")
def test_a_dictionary_of_arguments_is_the_object(case: Case, tokenizer: Tokenizer) -> None:
    assert '<｜DSML｜parameter name="zone" string="true">UTC</｜DSML｜parameter>' in str(rendered(case))
    assert_golden(rendered(case, nest_dict_arguments=True), case, tokenizer)


@cases("encode_open", lambda case: case["id"] == "args_json_array")
def test_arguments_that_are_no_object_become_one_string(case: Case) -> None:
    assert '\n<｜DSML｜parameter name="arguments" string="true">[1,2]</｜DSML｜parameter>\n' in str(rendered(case))


@cases("encode_open", lambda case: case["id"] == "blocks_user_content_list")
def test_text_parts_are_joined_by_a_blank_line(case: Case) -> None:
    assert str(rendered(case)).endswith("<｜User｜>a\n\nb<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("think", "release", "level"),
    [
        ("off", "april", (False, None)),
        ("none", "0731", (False, None)),
        ("high", "april", (True, "high")),
        ("max", "april", (True, "max")),
        ("low", "april", (True, "high")),
        ("low", "0731", (True, "low")),
        ("medium", "0731", (True, "high")),
        ("ultra", "0731", (True, "max")),
    ],
)
def test_levels_of_a_release(think: str, release: str, level: tuple[bool, str | None]) -> None:
    assert think_level(think, release) == level


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(UsageError, match="'deep'"):
        think_level("deep", "april")


SPELLINGS = (
    texts.BOS, texts.EOS, texts.USER, texts.ASSISTANT, texts.REMINDER, texts.THINK, texts.END_THINK, texts.DSML,
    *texts.TASKS.values(), "</｜DSML｜parameter>", "\n\n<｜DSML｜tool_calls>\n",
)  # fmt: skip
HOSTILE = st.lists(st.sampled_from(SPELLINGS) | st.text(max_size=4), min_size=1, max_size=5).map("".join).filter(bool)


def conversation(words: str) -> Rendered:
    """The same turns whatever `words` are, which stand everywhere a caller can put text."""
    call = {
        "id": "c",
        "function": {"name": words, "arguments": json.dumps({words: words, f"{words}2": {words: [words]}})},
    }
    messages = [
        {"role": "system", "content": words, "response_format": {"title": words}},
        {"role": "latest_reminder", "content": words},
        {"role": "user", "content": words},
        {"role": "assistant", "reasoning_content": words, "content": words, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": words},
        {"role": "developer", "content": words},
    ]
    tools = [{"type": "function", "function": {"name": words, "description": words}}]
    return render(messages, thinking=True, tools=tools)


@settings(max_examples=60, deadline=None)
@given(words=HOSTILE)
def test_no_text_becomes_a_control_token(words: str, tokenizer: Tokenizer) -> None:
    def controls(prompt: Rendered) -> list[int]:
        return [token for token in tokenizer.encode(prompt) if token in tokenizer.control_ids]

    hostile, harmless = conversation(words), conversation("harmless")
    placed = [tokenizer.control(segment.text) for segment in hostile if isinstance(segment, Control)]
    assert controls(hostile) == controls(harmless) == placed
    assert words in str(hostile)


def test_neighbouring_texts_are_one_segment() -> None:
    prompt = Rendered()
    for piece in ("a", "", "b"):
        prompt.text(piece)
    prompt.marked("c<think>d", (texts.THINK,))
    assert prompt.segments == [Text("abc"), Control("<think>"), Text("d")]
