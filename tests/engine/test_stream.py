"""The stream, with a model that says what is written down: what is shown, what ends it, and what stays in the session."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from dsv4cli.encoding.texts import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from dsv4cli.engine import Engine, Sampling, Token, turn
from dsv4cli.engine.session import Session
from dsv4cli.errors import UsageError
from tests.engine.mock_model import PLACEHOLDER, Scripted, engine_of

GREEDY = Sampling(temperature=0)
ASK = [{"role": "user", "content": "Hi"}]
PROMPT = 6  # tokens: BOS User H i Assistant and the think tag
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = ("\n\n<", DSML, 'tool_calls>\n<', DSML, 'invoke name="weather">\n<', DSML, 'parameter name="city" string="true">',
        "Paris</", DSML, "parameter>\n</", DSML, "invoke>\n</", DSML, "tool_calls>")


class Script:
    """An engine whose model goes on with `parts` (texts and control spellings) after the prompt, then with EOS."""

    def __init__(self, *parts: str, at: int = PROMPT, ctx: int = 4096) -> None:
        self.model = Scripted()
        self.engine: Engine = engine_of(self.model, ctx=ctx)
        self.session: Session = self.engine.session()
        self.ids = self.encode(*parts)
        self.write(at, self.ids)

    def encode(self, *parts: str) -> list[int]:
        known = self.engine.tokenizer
        return [token for part in parts for token in ([known.control(part)] if part in
                (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML, PLACEHOLDER) else known.encode_text(part))]

    def write(self, at: int, ids: list[int]) -> None:
        self.model.script = {at + place: token for place, token in enumerate(ids)}

    def chat(self, **options: Any) -> Iterator[Token]:
        options = {"sampling": GREEDY, "session": self.session, "think": "off", **options}
        return self.engine.chat(options.pop("messages", ASK), **options)


def text_of(records: list[Token], kind: str = "answer") -> str:
    return "".join(record.text for record in records if record.kind == kind)


def test_one_record_per_token_and_the_last_one_says_why() -> None:
    script = Script("Hello!")
    records = list(script.chat())
    assert [record.text for record in records] == [*"Hello!", ""]
    assert [record.id for record in records] == [*script.ids, 257]
    assert [record.index for record in records] == list(range(7))
    assert [record.finish for record in records] == [None] * 6 + ["stop"]
    assert {record.kind for record in records} == {"answer"}


def test_the_numbers_in_a_record() -> None:
    script = Script("Hello!")
    records = list(script.chat())
    last = records[-1]
    assert (last.prompt_tokens, last.cached_tokens) == (PROMPT, 0)
    assert last.prompt_seconds > 0
    assert last.prompt_tok_s == pytest.approx(PROMPT / last.prompt_seconds)
    assert last.decode_tok_s == pytest.approx(6 / last.decode_seconds)
    assert all(a.decode_seconds < b.decode_seconds for a, b in pairwise(records))
    assert last.memory_bytes == 1000 + script.session.nbytes
    assert last.rss_bytes >= 0


def test_a_character_of_several_bytes_comes_out_whole() -> None:
    records = list(Script("a→b").chat())
    assert [record.text for record in records] == ["a", "", "", "→", "b", ""]


def test_reasoning_then_answer() -> None:
    records = list(Script("2+2", END_THINK, "It is 4.").chat(think="high"))
    assert (text_of(records, "reasoning"), text_of(records)) == ("2+2", "It is 4.")
    assert records[3].text == ""  # </think> itself is never shown


@pytest.mark.parametrize("end", [EOS, USER, ASSISTANT])
def test_turn_tokens_end_the_answer(end: str) -> None:
    records = list(Script("No.", end, "more").chat())
    assert (text_of(records), records[-1].finish) == ("No.", "stop")


def test_a_stop_string_is_swallowed_and_what_may_begin_one_is_held_back() -> None:
    script = Script("one#two##three")
    records = list(script.chat(stop=["##"]))
    assert [record.text for record in records] == [*"one", "", "#t", *"wo", "", ""]
    assert records[-1].finish == "stop"


def test_stop_strings_do_not_touch_the_reasoning() -> None:
    records = list(Script("a##b", END_THINK, "c##d").chat(think="high", stop=["##"]))
    assert (text_of(records, "reasoning"), text_of(records), records[-1].finish) == ("a##b", "c", "stop")


def test_what_was_held_back_comes_with_the_last_record() -> None:
    records = list(Script("wait#").chat(stop=["##"]))
    assert (records[-1].text, records[-1].finish) == ("#", "stop")


def test_max_tokens() -> None:
    records = list(Script("Hello!").chat(max_tokens=3))
    assert [(record.text, record.finish) for record in records] == [("H", None), ("e", None), ("l", "length")]


def test_an_answer_cut_inside_a_character_says_so() -> None:
    records = list(Script("a→").chat(max_tokens=2))
    assert [record.text for record in records] == ["a", "\ufffd"]


def test_the_end_of_the_context() -> None:
    script = Script("Hello!", ctx=PROMPT + 2)
    records = list(script.chat())
    assert (text_of(records), records[-1].finish) == ("Hel", "length")  # the third needs no place: nothing follows it
    assert script.session.room == 0


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_think_budget_closes_the_reasoning(budget: int) -> None:
    """The model would think on; after the forced `</think>` it answers with what is written behind that place."""
    script = Script("long chains of thought")
    script.write(PROMPT, [*script.ids[:budget + 1], *script.encode("So: 4.")])
    records = list(script.chat(think="high", think_budget=budget))
    assert text_of(records, "reasoning") == "long chains of thought"[:budget]
    assert text_of(records) == "So: 4."
    assert records[budget].id == script.encode(END_THINK)[0]


def test_a_think_budget_that_is_not_used_up_changes_nothing() -> None:
    records = list(Script("short", END_THINK, "So: 4.").chat(think="high", think_budget=50))
    assert (text_of(records, "reasoning"), text_of(records)) == ("short", "So: 4.")


def test_a_think_budget_means_nothing_without_thinking() -> None:
    assert text_of(list(Script("Hello!").chat(think_budget=1))) == "Hello!"


@pytest.mark.parametrize("as_event", [True, False])
def test_cancelling_between_tokens_leaves_the_session_in_step(as_event: bool) -> None:
    script = Script("Hello!")
    event = threading.Event()
    records = []
    for record in script.chat(cancel=event if as_event else event.is_set):
        records.append(record)
        if record.text == "l":
            event.set()
    assert (text_of(records), records[-1].finish) == ("Hel", "cancelled")
    assert records[-1].id is None
    assert script.session.ids[PROMPT:] == script.ids[:3]
    assert text_of(list(script.chat())) == "Hello!"


def test_cancelling_before_anything_was_computed() -> None:
    records = list(Script("Hello!").chat(cancel=lambda: True))
    assert [(record.id, record.text, record.index, record.finish) for record in records] == [(None, "", -1, "cancelled")]


def test_leaving_the_generator_leaves_a_usable_session() -> None:
    script = Script("Hello!")
    stream = script.chat()
    next(stream), next(stream)
    stream.close()
    assert text_of(list(script.chat())) == "Hello!"


def calling(*parts: str) -> Script:
    """A script for a prompt that declares the weather tool."""
    script = Script()
    prompt = turn.prompt_of(script.engine, ASK, session=script.session, think="off", tools=WEATHER)
    script.write(len(prompt.ids), script.encode(*parts))
    return script


def test_a_tool_call() -> None:
    script = calling("Let me look.", *CALL)
    records = list(script.chat(tools=WEATHER))
    assert text_of(records) == "Let me look."
    assert records[-1].finish == "tool_calls"
    assert [call["function"] for call in records[-1].tool_calls] == [{"name": "weather", "arguments": '{"city": "Paris"}'}]
    assert text_of(records, "tool_call") == '{"city": "Paris"}'
    assert all(record.finish is None and not record.tool_calls for record in records[:-1])


def test_text_held_back_for_a_stop_string_comes_out_before_a_call() -> None:
    script = calling("Look#", *CALL)
    records = list(script.chat(tools=WEATHER, stop=["##"]))
    assert (text_of(records), records[-1].finish) == ("Look#", "tool_calls")
    assert [record.id for record in records if record.id is not None] == script.encode("Look#", *CALL)


def test_a_call_that_is_cut_off_keeps_its_open_arguments() -> None:
    script = calling(*CALL[:7], "Par")
    last = list(script.chat(tools=WEATHER, max_tokens=len(script.model.script)))[-1]
    assert last.finish == "length"
    assert last.tool_calls[0]["function"] == {"name": "weather", "arguments": '{"city": "Par'}


def test_a_block_without_calls_is_no_reason_to_stop_for_calls() -> None:
    script = calling("No.\n\n<", DSML, "tool_calls>\n</", DSML, "tool_calls>", "more")
    records = list(script.chat(tools=WEATHER))
    assert (text_of(records), records[-1].finish, records[-1].tool_calls) == ("No.", "stop", [])


def test_placeholders_are_never_sampled() -> None:
    """The mock wants one; what comes instead is the next likeliest, which is some other token."""
    records = list(Script(PLACEHOLDER).chat(max_tokens=1))
    assert records[0].id != Script().encode(PLACEHOLDER)[0]


@pytest.mark.parametrize(("options", "said"), [
    ({"max_tokens": 0}, "max_tokens is 0"), ({"think_budget": -1}, "-1"), ({"stop": [""]}, "stop string is empty"),
    ({"think": "deeply"}, "deeply"), ({"messages": [{"role": "nobody", "content": ""}]}, "nobody"),
])
def test_bad_requests_are_refused_before_the_first_record(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Script("Hello!").chat(**options)


def test_a_prompt_longer_than_the_context_names_both_numbers() -> None:
    with pytest.raises(UsageError, match="104 tokens do not fit into the context of 50"):
        Script(ctx=50).chat(messages=[{"role": "user", "content": "x" * 100}])
