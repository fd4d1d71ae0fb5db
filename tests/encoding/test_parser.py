"""Completions taken apart: every golden however it is cut, as text and as ids; the strict grammar; arbitrary text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4cli.encoding import texts
from dsv4cli.encoding.parser import Completion, CompletionParser, Delta, parse_strict
from dsv4cli.encoding.segments import Control, Rendered
from dsv4cli.encoding.template import render
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.errors import Dsv4Error
from tests.encoding.conftest import Case, cases

# Where the reference loses data and says itself that it is no model: attributes are read in any order, and a parameter
# that does not say what it is, is text.
TOLERANT = {"mf_no_string_attr": '{"zone": "UTC"}', "mf_attr_order": '{"zone": "UTC"}'}
# The script closes a call that was cut off if it was cut behind a parameter; here a completion without EOS is an error.
CUT_OFF = {"mf_truncated_after_param"}
CONTROLS = (texts.EOS, texts.THINK, texts.END_THINK, texts.DSML)

Parts = tuple[str, str, list[tuple[str, str]], str]


def expected(case: Case) -> Parts:
    parts = case.get("expected_server", case["expected"])
    calls = [(call["name"], TOLERANT.get(case["id"], call["arguments"])) for call in parts["tool_calls"]]
    return parts["reasoning_content"], parts["content"], calls, case["expected_finish_reason"]


def parts_of(result: Completion) -> Parts:
    calls = [(call.name, call.arguments) for call in result.calls]
    return result.reasoning, result.content, calls, str(result.finish_reason)


def summed(deltas: Iterable[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """What a client makes of the stream: it adds texts up and knows nothing else."""
    said = {"reasoning": "", "content": ""}
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.kind != "tool_call":
            said[delta.kind] += delta.text
        elif delta.name is not None:
            assert (delta.index, delta.text) == (len(calls), "")
            assert delta.id
            calls.append((delta.name, ""))
        else:
            assert delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return said["reasoning"], said["content"], calls


def cause(case: Case) -> str:
    return "stop" if case["stop_cause"] == "eos" else str(case["stop_cause"])


def read(chunks: Iterable[str], *, thinking: bool, tools: bool = True, why: str = "stop") -> Parts:
    """Feeds text, checks the stream against the result, returns the parts."""
    parser = CompletionParser(thinking=thinking, tools_declared=tools, spelled_controls=True)
    chunks = list(chunks)
    deltas = [delta for chunk in chunks for delta in parser.push_text(chunk)] + parser.finish(why)
    parts = parts_of(parser.result)
    assert summed(deltas) == parts[:3]
    assert parser.result.exact == "".join(chunks)
    return parts


def read_case(case: Case, chunks: Iterable[str]) -> Parts:
    thinking = case["thinking_mode"] == "thinking"
    return read(chunks, thinking=thinking, tools=case["tools_declared"], why=cause(case))


def ids_of(tokenizer: Tokenizer, completion: str) -> list[int]:
    """The ids of a completion in which the model chose every control token as one id."""
    segments = Rendered()
    segments.marked(completion, CONTROLS)
    return tokenizer.encode(segments)


def read_ids(parser: CompletionParser, ids: Iterable[int], why: str = "stop") -> Parts:
    deltas = [delta for token in ids for delta in parser.push(token)] + parser.finish(why)
    parts = parts_of(parser.result)
    assert summed(deltas) == parts[:3]
    return parts


@cases("parse_open")
def test_golden_in_one_piece(case: Case) -> None:
    parts = read_case(case, [case["completion_text"]])
    assert parts == expected(case)
    for call, (_, arguments) in zip(case["expected"]["tool_calls"], parts[2], strict=True):
        if call["arguments_json"] is not None and case["id"] not in TOLERANT:
            assert json.loads(arguments) == call["arguments_json"]


@cases("parse_open")
def test_golden_in_every_two_pieces(case: Case) -> None:
    text, parts = case["completion_text"], expected(case)
    assert all(read_case(case, [text[:cut], text[cut:]]) == parts for cut in range(len(text) + 1))


@cases("parse_open")
def test_golden_in_single_characters(case: Case) -> None:
    assert read_case(case, case["completion_text"]) == expected(case)


@cases("parse_open")
def test_golden_in_tokens(case: Case, tokenizer: Tokenizer) -> None:
    """Ids, as the engine feeds them; and the same tokens' texts, as a backend without ids would."""
    ids = ids_of(tokenizer, case["completion_text"])
    parser = CompletionParser(
        tokenizer, thinking=case["thinking_mode"] == "thinking", tools_declared=case["tools_declared"]
    )
    assert read_ids(parser, ids, cause(case)) == expected(case)
    assert parser.result.exact == case["completion_text"]
    assert read_case(case, [tokenizer.decode([token]) for token in ids]) == expected(case)


def strict_answer(case: Case) -> dict[str, Any] | None:
    """None: the official strict parser raises."""
    if "strict_parser_error" in case or case["id"] in CUT_OFF:
        return None
    answer: dict[str, Any] = case.get("strict_parser_result", case["expected"])
    return answer


@cases("parse_open", lambda case: strict_answer(case) is not None)
def test_strict_golden(case: Case) -> None:
    parts = strict_answer(case)
    assert parts is not None
    calls = [(call["name"], call["arguments"]) for call in parts["tool_calls"]]
    reason = "tool_calls" if calls else "stop"
    result = parse_strict(case["completion_text"], case["thinking_mode"] == "thinking")
    assert parts_of(result) == (parts["reasoning_content"], parts["content"], calls, reason)


@cases("parse_open", lambda case: strict_answer(case) is None)
def test_strict_refuses(case: Case) -> None:
    with pytest.raises(Dsv4Error, match="not well-formed"):
        parse_strict(case["completion_text"], case["thinking_mode"] == "thinking")


BLOCK = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n{}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
OPEN_VALUE = '<｜DSML｜parameter name="k" string="true">'
VALUE = OPEN_VALUE + "{}</｜DSML｜parameter>"


def arguments(body: str) -> str:
    _, _, [(name, found)], reason = read([BLOCK.format(body)], thinking=False)
    assert (name, reason) == ("f", "tool_calls")
    return found


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("", "{}"),
        (VALUE.format('"\\\x01é\t'), '{"k": "\\"\\\\\\u0001é\\t"}'),
        ('<｜DSML｜parameter name="k" string="false">{oops</｜DSML｜parameter>', '{"k": {oops}'),
        ('<｜DSML｜parameter name="a key=1" string="true">v</｜DSML｜parameter>', '{"a key=1": "v"}'),
        ('<｜DSML｜parameter name="a>b" string="true">v</｜DSML｜parameter>', '{"a>b": "v"}'),
        ('<｜DSML｜parameter\n  string = "false"  name = "k" >1</｜DSML｜parameter>', '{"k": 1}'),
        ("<｜DSML｜parameter>lost</｜DSML｜parameter>" + VALUE.format("v"), '{"k": "v"}'),
        ('<｜DSML｜parameter name="unfinished <｜DSML｜parameter name="k" string="true">v</｜DSML｜x>', '{"k": "v"}'),
        (VALUE.format("a <｜DSML｜parameter> b"), '{"k": "a <｜DSML｜parameter> b"}'),
        (VALUE.format("</think><think>"), '{"k": "</think><think>"}'),
        (OPEN_VALUE + "v", '{"k": "v\\n"}'),  # the call's closer ends it
        ("noise ｜DSML｜ between" + VALUE.format("v") + "noise > too", '{"k": "v"}'),
    ],
)
def test_arguments(body: str, found: str) -> None:
    assert arguments(body) == found


def test_an_opener_closes_the_call_before() -> None:
    text = '<｜DSML｜invoke name="a"><｜DSML｜invoke name="b">' + VALUE.format("v") + "</｜DSML｜tool_calls>"
    assert read([text], thinking=False)[2] == [("a", "{}"), ("b", '{"k": "v"}')]


@pytest.mark.parametrize("wrapper", ["tool_calls", "function_calls", " calls"])
def test_what_follows_the_block_is_discarded(wrapper: str) -> None:
    text = f'a<｜DSML｜{wrapper}><｜DSML｜invoke name="f"></｜DSML｜invoke></｜DSML｜{wrapper}>'
    assert read([text + "\n\nmore" + text], thinking=False) == ("", "a", [("f", "{}")], "tool_calls")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("answer\n\n", ("", "answer\n\n", [], "length")),
        ("answer\n\n<", ("", "answer\n\n<", [], "length")),
        ("answer</thi", ("", "answer</thi", [], "length")),
        ("answer\n\n<｜DSML｜tool_calls>\n<｜DSML｜inv", ("", "answer", [], "length")),
        ('<｜DSML｜tool_calls>\n<｜DSML｜invoke name="cl', ("", "", [], "length")),
        ('<｜DSML｜invoke name="clock">', ("", "", [("clock", "")], "length")),
        ('<｜DSML｜invoke name="f"><｜DSML｜parameter name="k', ("", "", [("f", "")], "length")),
        ('<｜DSML｜invoke name="f">' + OPEN_VALUE + "a</", ("", "", [("f", '{"k": "a</')], "length")),
    ],
)
def test_cut_off(text: str, parts: Parts) -> None:
    assert read([text], thinking=False, why="length") == parts
    assert read(text, thinking=False, why="length") == parts


def test_reasoning_that_is_never_closed_keeps_its_newlines() -> None:
    assert read(["\nthought\n\n"], thinking=True, why="length") == ("thought\n\n", "", [], "length")


def test_nothing_is_held_longer_than_needed() -> None:
    parser = CompletionParser(thinking=True, tools_declared=True, spelled_controls=True)
    given = [
        "".join(d.text for d in parser.push_text(text)) for text in ("a", "\n", "\n", "b</", "t", "o", "<", "x</think>")
    ]
    assert given == ["a", "", "", "\n\nb", "", "</to", "", "<x"]
    assert not parser.thinking


def test_newlines_are_not_held_without_tools() -> None:
    parser = CompletionParser(thinking=False, tools_declared=False)
    assert parser.push_text("a\n\n<") == [Delta("content", "a\n\n<")]


def test_calls_stream_in_the_shape_of_openai() -> None:
    parser = CompletionParser(thinking=False, tools_declared=True, spelled_controls=True, call_id="id{}".format)
    deltas = [delta for character in BLOCK.format(VALUE.format("é\n")) for delta in parser.push_text(character)]
    first, *rest = deltas
    assert first == Delta("tool_call", "", 0, "id0", "f")
    assert [delta.text for delta in rest] == ['{"k": "', "é", "\\n", '"', "}"]
    assert all((delta.index, delta.id, delta.name) == (0, None, None) for delta in rest)
    assert parser.done
    assert parser.finish("tool_calls") == []
    function = {"name": "f", "arguments": '{"k": "é\\n"}'}
    assert parser.result.tool_calls == [{"id": "id0", "type": "function", "function": function}]
    assert parser.result.finish_reason == "tool_calls"


def test_ids_of_calls_sort_like_the_calls() -> None:
    parser = CompletionParser(thinking=False, tools_declared=True, spelled_controls=True)
    parser.push_text("".join(f'<｜DSML｜invoke name="f{n}"></｜DSML｜invoke>' for n in range(12)))
    ids = [call.id for call in parser.result.calls]
    assert ids == sorted(set(ids))
    assert len(ids) == 12


def test_the_same_letters_from_ordinary_tokens_are_text(tokenizer: Tokenizer) -> None:
    """Only the control ids count: a model that explains the format cannot close its reasoning or call a tool by it."""
    text = "it writes </think> and then" + BLOCK.format(VALUE.format("v")) + "<｜end▁of▁sentence｜>"
    ids = tokenizer.encode_text(text)
    parser = CompletionParser(tokenizer, thinking=True, tools_declared=True)
    assert read_ids(parser, ids, "length") == (text, "", [], "length")
    quoted = BLOCK.format(VALUE.format("｜DSML｜ </｜DSML｜parameter> </think>")).split("｜DSML｜")
    parser = CompletionParser(thinking=False, tools_declared=True)
    for place, piece in enumerate(quoted):
        if place not in (0, 4, 5):  # the value's own two are ordinary text
            parser.push_control(texts.DSML)
        elif place:
            parser.push_text(texts.DSML)
        parser.push_text(piece)
    parser.finish("stop")
    assert json.loads(parser.result.calls[0].arguments) == {"k": "｜DSML｜ </｜DSML｜parameter> </think>"}


def test_broken_characters_and_foreign_controls(tokenizer: Tokenizer) -> None:
    """Half a character before a control token is U+FFFD; control tokens that mean nothing here are not shown."""
    half = tokenizer.encode_text("🜚")[0]
    ids = [half, tokenizer.control(texts.END_THINK), tokenizer.control(texts.TASKS["title"]), half]
    parser = CompletionParser(tokenizer, thinking=True, tools_declared=True)
    assert read_ids(parser, ids) == ("\ufffd", "\ufffd", [], "stop")
    assert parser.result.exact == "\ufffd</think><｜title｜>\ufffd"


def test_the_next_turn_is_not_part_of_the_answer(tokenizer: Tokenizer) -> None:
    parser = CompletionParser(tokenizer, thinking=False, tools_declared=True)
    ids = [*tokenizer.encode_text("yes\n"), tokenizer.control(texts.USER), *tokenizer.encode_text("and?")]
    assert read_ids(parser, ids) == ("", "yes\n", [], "stop")


PIECES = st.sampled_from(
    ["</think>", "<think>", "｜DSML｜", texts.EOS, "<", "</", "\n", "\n\n", "｜", "<｜", "</th", "ink>", "DSM", "L｜", ">",
     "tool_calls>", ' name="', 'invoke name="f">', 'parameter name="k" string="true">', 'string="false"', '"', "{", "a",
     '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n', '<｜DSML｜parameter name="k" string="true">',
     "</｜DSML｜parameter>", "</｜DSML｜invoke>", "</｜DSML｜tool_calls>"]
)  # fmt: skip
COMPLETIONS = st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)


def spoken(text: str, thinking: bool, tools: bool) -> tuple[str, str]:
    """Reasoning and answer of a whole completion, by searching instead of streaming."""
    text = text.partition(texts.EOS)[0]
    block = re.search("\n*<｜DSML｜", text) if tools else None
    said, reasoning, closed = text[: block.start()] if block else text, "", ""
    if thinking:
        reasoning, closed, said = said.partition("</think>")
        reasoning = reasoning.rstrip("\n") if closed or block else reasoning
    answer = said.replace("</think>", "").lstrip("\n")
    return reasoning.lstrip("\n"), answer.rstrip("\n") if block else answer


@settings(max_examples=400, deadline=None)
@given(text=COMPLETIONS, thinking=st.booleans(), tools=st.booleans(), data=st.data())
def test_any_completion_cut_anywhere(text: str, thinking: bool, tools: bool, data: st.DataObject) -> None:
    """Cuts change nothing, and nothing of the markup is ever given out: the stream adds up to what searching finds."""
    whole = read([text], thinking=thinking, tools=tools)
    assert whole[:2] == spoken(text, thinking, tools)
    assert read(text, thinking=thinking, tools=tools) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(chunks, thinking=thinking, tools=tools) == whole


# Without control spellings, which the strict grammar refuses in text (Hypothesis finds `<think>` among our constants).
WORDS = st.text(st.characters(exclude_characters="｜", exclude_categories=("Cs",)), max_size=8).filter(
    lambda words: texts.THINK not in words and texts.END_THINK not in words
)
NAMES = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, JSON, max_size=3)), max_size=3)


@settings(max_examples=100, deadline=None)
@given(reasoning=WORDS, content=WORDS, calls=CALLS)
def test_what_the_template_writes_is_read_back(
    reasoning: str, content: str, calls: list[tuple[str, dict[str, Any]]], tokenizer: Tokenizer
) -> None:
    """By the strict parser to the byte, and by the streaming one from ids without the newlines around the parts."""
    message = {
        "role": "assistant", "reasoning_content": reasoning, "content": content,
        "tool_calls": [{"function": {"name": name, "arguments": json.dumps(values)}} for name, values in calls],
    }  # fmt: skip
    question = {"role": "user", "content": "?"}
    prompt = render([question, message], thinking=True)
    start = prompt.segments.index(Control(texts.THINK)) + 1
    answer = Rendered(prompt.segments[start:])
    strict = parse_strict(str(answer), thinking=True)
    assert (strict.reasoning, strict.content) == (reasoning, content)
    assert [(call.name, json.loads(call.arguments)) for call in strict.calls] == calls
    parser = CompletionParser(tokenizer, thinking=True, tools_declared=True)
    trimmed = content.strip("\n") if calls else content.lstrip("\n")
    raw = [(call.name, call.arguments) for call in strict.calls]
    assert read_ids(parser, tokenizer.encode(answer))[:3] == (reasoning.strip("\n"), trimmed, raw)


def test_ids_need_a_tokenizer() -> None:
    with pytest.raises(TypeError, match="needs a tokenizer"):
        CompletionParser(thinking=False, tools_declared=False).push(1)
