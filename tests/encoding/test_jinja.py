"""The Jinja template: every golden prompt, through jinja2 as transformers sets it up and through llama.cpp's own engine."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv4_quant.files import open_source
from dsv4cli.encoding import texts
from dsv4cli.encoding.jinja import chat_template, literal
from dsv4cli.encoding.template import render
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog
from tests.encoding.conftest import Case, cases
from tests.support.gguf_writer import Kind, write

Messages = list[dict[str, Any]]
# Where the template serves an API and not the script: its words for levels of effort are known, call arguments are objects,
# text parts are joined.
DEVIATIONS = {"effort_low_rejected_april", "e0731_reject_medium", "e0731_reject_xhigh", "e0731_reject_none_string",
              "args_dict_instead_of_string", "args_json_array", "blocks_user_content_list"}
# What llama.cpp does to a request before its template sees it: it knows no tasks and no schemas in messages, developers are
# systems, arguments must be JSON, and a last assistant message is gone on with.
NOT_LLAMA = DEVIATIONS | {
    "tools_with_response_format", "rf_system", "rf_developer", "dev_only_chat", "dev_dropped_before_last_user",
    "dev_not_merged_with_user", "dev_empty_rejected", "call_result_list_blocks", "args_not_json", "empty_reasoning_last_turn",
    "calls_empty_list", "task_action_chat", "task_query", "task_domain", "task_read_url", "task_title_output",
    "task_user_not_merged", "task_mid_history_lost", "cont_wo_eos_reasoning_only", "misc_unknown_role", "misc_no_messages",
    "basic_bos_off"}


def refuse(message: str) -> None:
    raise ValueError(message)


def through_jinja2(release: str, messages: Messages, **given: Any) -> str:
    return _compiled(release).render(messages=messages, **{"add_generation_prompt": True, **given})


@cache
def _compiled(release: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(chat_template(release))


def with_objects(messages: Messages) -> Messages:
    """Call arguments as objects, which servers make of them before they render."""
    found: Messages = json.loads(json.dumps(messages))
    for message in found:
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            try:
                parsed = json.loads(function["arguments"])
            except (TypeError, ValueError):
                continue
            function["arguments"] = parsed if isinstance(parsed, dict) else function["arguments"]
    return found


def told(case: Case) -> dict[str, Any]:
    return {"enable_thinking": case["thinking_mode"] == "thinking", "drop_thinking": case["drop_thinking"],
            "reasoning_effort": case["reasoning_effort"]}


def prompted(case: Case) -> bool:
    return case["id"] not in DEVIATIONS and not case.get("context")


@cases("encode_open", prompted)
def test_april_prompts(case: Case) -> None:
    assert_golden(case)


@cases("encode_0731_open", prompted)
def test_0731_prompts(case: Case) -> None:
    assert_golden(case)


def assert_golden(case: Case) -> None:
    def rendered() -> str:
        bos = texts.BOS if case.get("add_default_bos_token", True) else ""
        return through_jinja2(case["release"], with_objects(case["messages"]), tools=case["tools"], bos_token=bos, **told(case))

    if case["expected_prompt"] is None:
        with pytest.raises(ValueError):
            rendered()
    else:
        assert rendered() == case["expected_prompt"]


TEXT = st.sampled_from(["", "a", "b\n", "<think>", "{{ x }}", "{% raw %}", "ﬀ \"'\\", "\n\n"])


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Messages in any order that an API lets through, with reasoning, calls and results for them."""
    found: Messages = []
    for number in range(draw(st.integers(1, 6))):
        role = draw(st.sampled_from(["system", "user", "assistant", "tool", "latest_reminder", "developer"]))
        message: dict[str, Any] = {"role": role, "content": draw(TEXT) + ("x" if role == "developer" else "")}
        if role == "assistant":
            message["reasoning_content"] = draw(TEXT)
            ids = draw(st.lists(st.sampled_from(["i", "j", "k"]), max_size=3, unique=True))
            arguments = {"a": draw(TEXT), "b": draw(st.sampled_from([1, 2.5, None, True, [1, "é"], {"c": "d"}]))}
            message["tool_calls"] = [{"id": id, "function": {"name": f"f{number}", "arguments": arguments}} for id in ids]
        elif role == "tool":
            message["tool_call_id"] = draw(st.sampled_from(["i", "j", "k", "l"]))
        if role in ("user", "assistant"):
            message["task"] = draw(st.sampled_from([None, None, None, "action", "query", "title"]))
        found.append(message)
    return found


@settings(max_examples=300, deadline=None)
@given(messages=conversations(), thinking=st.booleans(), drop=st.booleans(), declared=st.booleans(),
       release=st.sampled_from(["april", "0731"]), effort=st.sampled_from([None, "high", "max"]))
def test_whatever_the_conversation_it_is_rendered_as_we_render_it(messages: Messages, thinking: bool, drop: bool, declared: bool,
                                                                  release: Any, effort: str | None) -> None:
    tools = [{"type": "function", "function": {"name": "g", "parameters": {"é": [1, {"<": ">"}]}}}] if declared else None
    ours = render(messages, thinking=thinking, drop_thinking=drop, tools=tools, effort=effort, release=release)
    assert through_jinja2(release, messages, enable_thinking=thinking, drop_thinking=drop, tools=tools,
                          reasoning_effort=effort) == str(ours)


@pytest.mark.parametrize(("given", "end"), [
    ({}, "<think>"), ({"enable_thinking": False}, "</think>"), ({"thinking": False}, "</think>"),
    ({"reasoning_effort": "none"}, "</think>"), ({"reasoning_effort": "high"}, "<think>"),
    ({"reasoning_effort": "max", "enable_thinking": False}, "</think>")])
def test_how_to_switch_thinking(given: dict[str, Any], end: str) -> None:
    assert through_jinja2("april", [{"role": "user", "content": "a"}], **given).endswith(f"<｜User｜>a<｜Assistant｜>{end}")


def test_an_api_s_words_for_effort() -> None:
    def prefix(release: str, effort: str) -> str:
        prompt = through_jinja2(release, [{"role": "user", "content": "a"}], reasoning_effort=effort)
        return prompt.removeprefix(texts.BOS).partition(texts.USER)[0]

    assert prefix("april", "low") == prefix("0731", "minimal") == ""
    assert prefix("april", "ultra") == prefix("0731", "medium") == texts.ABSOLUTE_MAXIMUM
    assert prefix("0731", "max") == texts.BEYOND_MAXIMUM
    with pytest.raises(ValueError, match="Unknown reasoning_effort: enormous"):
        prefix("april", "enormous")


def test_without_a_generation_prompt_and_a_schema_of_the_request() -> None:
    asked = [{"role": "user", "content": "a"}]
    for answer in (False, None):
        assert through_jinja2("april", asked, add_generation_prompt=answer) == "<｜begin▁of▁sentence｜><｜User｜>a"
    schema = {"type": "object"}
    assert through_jinja2("april", asked, response_format=schema, enable_thinking=False) == str(render(
        [{"role": "system", "content": "", "response_format": schema}, *asked], thinking=False))


def test_arguments_as_text_are_refused() -> None:
    call = {"id": "a", "function": {"name": "f", "arguments": '{"a": 1}'}}
    with pytest.raises(ValueError, match="this template takes an object"):
        through_jinja2("april", [{"role": "assistant", "content": "", "tool_calls": [call]}])


def test_nothing_is_left_to_fill_in_and_nothing_confuses_llama() -> None:
    """llama.cpp tells the format by these words."""
    for release in texts.EFFORT_TEXTS:
        assert "@@" not in chat_template(release)
        assert "dsml_token" in chat_template(release)
        assert "function_calls" not in chat_template(release)
    with pytest.raises(UsageError, match="no release 'may'"):
        chat_template("may")
    assert literal('a"\\\n') == '"a\\"\\\\\\n"'


# ---- llama.cpp -----------------------------------------------------------------------------------------------------

Post = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module", params=["april", "0731"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Post]:
    """llama.cpp's server over tiny with the template of one release; (release, post)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(write(open_source(catalog.resolve("tiny").located()),
                                  tmp_path_factory.mktemp("gguf") / "tiny.gguf", Kind.BF16))
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.port = 2048, 1, 0, 0
    params.warmup, params.fit_params, params.verbosity, params.use_jinja = False, False, 0, True
    params.chat_template = chat_template(request.param)
    running = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = urllib.request.Request(running.listening_address + path, json.dumps(body).encode(),
                                       {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                found: dict[str, Any] = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(error.read().decode())
        return found

    return request.param, post


def test_llama_renders_the_golden_prompts(server: tuple[str, Post]) -> None:
    release, post = server
    golden = Path(__file__).resolve().parent.parent / "golden"
    name = {"april": "encode_open", "0731": "encode_0731_open"}[release]
    seen = 0
    for case in json.loads((golden / f"{name}.json").read_text(encoding="utf-8"))["cases"]:
        if case["id"] in NOT_LLAMA or case.get("context") or case["release"] != release:
            continue
        switches = {key: value for key, value in told(case).items() if value is not None}
        tools = {"tools": case["tools"]} if case["tools"] else {}
        shown = post("/apply-template", {"messages": case["messages"], "chat_template_kwargs": switches, **tools})
        assert shown["prompt"] == case["expected_prompt"], case["id"]
        seen += 1
    assert seen >= {"april": 40, "0731": 7}[release]


def test_llama_reads_the_answers(server: tuple[str, Post]) -> None:
    """It knows the format by its template: reasoning, answers and calls come apart, and a schema reaches the prompt."""
    _, post = server
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 80, "temperature": 0}
    for thinking in (True, False):
        switch = {"chat_template_kwargs": {"enable_thinking": thinking}}
        message = post("/v1/chat/completions", {**question, **switch})["choices"][0]["message"]
        assert "Paris" in message["content"]
        assert "think>" not in message["content"]
        assert bool(message.get("reasoning_content")) == thinking
    tool = {"name": "get_weather", "description": "Get the weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
    asked = {**question, "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
             "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"type": "function", "function": tool}]}
    call = post("/v1/chat/completions", asked)["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Oslo"})
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    prompt = post("/apply-template", {**question, "response_format": schema})["prompt"]
    assert texts.RESPONSE_FORMAT in prompt
