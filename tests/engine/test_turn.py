"""Conversations over one session: what the next turn need not compute, and that prompts stay what the template says."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4cli.encoding.segments import Text
from dsv4cli.encoding.template import render
from dsv4cli.encoding.texts import DSML, END_THINK
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.engine import Sampling, turn
from dsv4cli.engine.session import Session
from dsv4cli.engine.turn import Spoken
from tests.engine.mock_model import Scripted, byte_tokenizer_json, engine_of

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def tokenizer(*merged: str) -> Tokenizer:
    """The byte tokenizer, with tokens of two bytes that the tokenizer itself prefers (ids 300, 301 ...)."""
    data = byte_tokenizer_json()
    data["model"]["vocab"] |= {pair: 300 + place for place, pair in enumerate(merged)}
    data["model"]["merges"] = [[pair[0], pair[1]] for pair in merged]
    return Tokenizer.from_dict(data)


def talk(session: Session, messages: list[Message], said: str, think: str, **options: Any) -> tuple[str, str, int]:
    """One turn, in which the model says `said`; returns (reasoning, answer, cached tokens)."""
    model, known = session.engine.model, session.engine.tokenizer
    assert isinstance(model, Scripted)
    start = len(turn.prompt_of(session.engine, messages, session=session, think=think, tools=options.get("tools")).ids)
    ids: list[int] = []
    for place, part in enumerate(said.split(END_THINK)):
        ids += ([known.control(END_THINK)] if place else []) + known.encode_text(part)
    model.script = {start + place: token for place, token in enumerate(ids)}
    records = list(session.engine.chat(messages, session=session, think=think, sampling=Sampling(temperature=0), **options))
    texts = {kind: "".join(r.text for r in records if r.kind == kind) for kind in ("reasoning", "answer")}
    return texts["reasoning"], texts["answer"], records[-1].cached_tokens


def asked(text: str) -> Message:
    return {"role": "user", "content": text}


def told(text: str, reasoning: str = "") -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def test_without_thinking_the_next_turn_extends_the_timeline() -> None:
    session = engine_of(Scripted()).session()
    talk(session, [asked("one")], "first answer", "off")
    before = session.position
    _, answer, cached = talk(session, [asked("one"), told("first answer"), asked("two")], "second", "off")
    assert (answer, cached) == ("second", before)


def test_dropped_reasoning_goes_back_to_the_header_and_no_further() -> None:
    session = engine_of(Scripted()).session()
    talk(session, [asked("one")], f"thoughts{END_THINK}first", "high")
    header = len("BUoneA")  # BOS, User, three letters, Assistant; behind them <think> becomes </think>
    _, answer, cached = talk(session, [asked("one"), told("first", "thoughts"), asked("two")], f"more{END_THINK}x", "high")
    assert (answer, cached) == ("x", header)


def test_with_tools_the_reasoning_stays_and_nothing_is_computed_again() -> None:
    session = engine_of(Scripted()).session()
    talk(session, [asked("one")], f"thoughts{END_THINK}first", "high", tools=TOOLS)
    before = session.position
    talked = [asked("one"), told("first", "thoughts"), asked("two")]
    assert talk(session, talked, f"more{END_THINK}x", "high", tools=TOOLS)[2] == before


def test_a_tool_round_extends_the_timeline() -> None:
    """The call goes through JSON to the client and back; rendered again it is what the model wrote, newline by newline."""
    session = engine_of(Scripted()).session()
    block = ("\n\n<", DSML, "tool_calls>\n<", DSML, 'invoke name="f">\n<', DSML, 'parameter name="n" string="false">',
             "2</", DSML, "parameter>\n</", DSML, "invoke>\n</", DSML, "tool_calls>")
    known, model = session.engine.tokenizer, session.engine.model
    assert isinstance(model, Scripted)
    ids = [token for part in block for token in ([known.control(DSML)] if part == DSML else known.encode_text(part))]
    start = len(turn.prompt_of(session.engine, [asked("one")], session=session, think="off", tools=TOOLS).ids)
    model.script = {start + place: token for place, token in enumerate(ids)}
    greedy = Sampling(temperature=0)
    last = list(session.engine.chat([asked("one")], session=session, think="off", sampling=greedy, tools=TOOLS))[-1]
    before = session.position
    history = [asked("one"), told("") | {"tool_calls": last.tool_calls}, {"role": "tool", "content": "4"}]
    assert talk(session, history, "four", "off", tools=TOOLS) == ("", "four", before)


def test_the_same_question_again_is_free() -> None:
    session = engine_of(Scripted()).session()
    talk(session, [asked("one")], "first", "off")
    _, answer, cached = talk(session, [asked("one")], "other", "off")
    assert cached == len("BUoneA/")
    assert answer == "fther"  # the first letter came from the logits that were kept


def test_taking_a_question_back_keeps_the_answer_before_it() -> None:
    session = engine_of(Scripted()).session()
    talk(session, [asked("one")], "first", "off")
    before = session.position
    talk(session, [asked("one"), told("first"), asked("two")], "second", "off")
    assert talk(session, [asked("one"), told("first"), asked("three")], "third", "off")[2] == before


def test_a_long_system_text_is_shared_between_conversations() -> None:
    session = engine_of(Scripted()).session()
    system = {"role": "system", "content": "s" * 100}
    talk(session, [system, asked("one")], "first", "off")
    assert talk(session, [system, asked("other")], "x", "off")[2] == 101


def test_the_limits_are_those_of_the_mode() -> None:
    session = engine_of(Scripted()).session()
    for think, limit in {"off": 8192, "high": 65_536, "max": 131_072}.items():
        prompt = turn.prompt_of(session.engine, [asked("x")], session=session, think=think, tools=None)
        assert turn.default_max_tokens(prompt) == limit


def spoken(known: Tokenizer, ids: list[int]) -> Spoken:
    return Spoken(known, [known.control(END_THINK), *ids])


def respelled(words: Spoken, known: Tokenizer, text: str) -> list[int]:
    """ids of an answer `text` in a rendered history."""
    history = [asked("q"), told(text), asked("r")]
    ids = words.encode(render(history, thinking=False))
    ends = [place for place, token in enumerate(ids) if token == known.control(END_THINK)]
    return ids[ends[0] + 1:ids.index(257)]


def test_words_come_back_in_the_spelling_that_was_sampled() -> None:
    known = tokenizer("ab")
    assert known.encode_text("abc") == [300, 99]
    sampled = [97, 98, 99]  # a b c, which the tokenizer would not choose
    closed = spoken(known, [*sampled, 257])
    assert respelled(closed, known, "abc") == sampled
    assert respelled(closed, known, "abcd") == [300, 99, 100]  # another text, another answer


def test_an_answer_that_was_cut_off_matches_its_beginning() -> None:
    known = tokenizer("ab")
    open_ended = spoken(known, [97, 98])
    assert respelled(open_ended, known, "ab") == [97, 98]
    assert respelled(open_ended, known, "abab") == [97, 98, 300]


@pytest.mark.parametrize("shown", ["abc", "\nabc", "abc\n", "\nabc\n"])
def test_newlines_that_the_parser_trims_are_kept_in_the_prompt(shown: str) -> None:
    known = tokenizer("ab")
    sampled = [10, 97, 98, 99, 10]
    expected = sampled if shown in ("abc", "abc\n", "\nabc\n") else known.encode_text(shown)
    assert respelled(spoken(known, [*sampled, 257]), known, shown) == expected


def test_only_the_models_own_words_are_respelled() -> None:
    """A user who writes what the model said is tokenised like any user."""
    known = tokenizer("ab")
    words = spoken(known, [97, 98, 257])
    rendered = render([asked("ab")], thinking=False)
    assert Text("ab") in rendered.segments
    assert words.encode(rendered) == known.encode(rendered)
    assert 300 in words.encode(rendered)
