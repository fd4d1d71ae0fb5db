"""`dsv4 run`: what is the model and what the prompt, and which stream gets what."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4cli.commands import run as command
from dsv4cli.engine.records import Token
from dsv4cli.errors import UsageError
from tests.support.fake_engine import FakeEngine
from tests.support.program import Outcome

Run = Callable[..., Outcome]


@pytest.mark.parametrize(("words", "piped", "expected"), [
    (["hello"], "", ("tiny", "hello")),
    (["flash", "hello"], "", ("flash", "hello")),
    (["flash"], "hello\n", ("flash", "hello")),
    (["hello"], "some text\n", ("tiny", "some text\n\nhello")),
    (["tiny", "Summarise."], "  indented\ntext\n\n", ("tiny", "  indented\ntext\n\nSummarise.")),
    (["tiny", "several", "words"], "", ("tiny", "several words")),
    ([], "hello", ("tiny", "hello")),
])
def test_model_and_prompt(words: list[str], piped: str, expected: tuple[str, str]) -> None:
    assert command.asked(words, piped, "tiny") == expected


@pytest.mark.parametrize(("words", "piped"), [([], ""), (["tiny"], ""), (["tiny", ""], " \n "), ([""], "")])
def test_nothing_to_answer_is_wrong_use(words: list[str], piped: str) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        command.asked(words, piped, "tiny")


def test_a_path_alone_is_the_model_when_text_comes_from_the_pipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert command.asked([str(tmp_path)], "hello", "tiny") == (str(tmp_path), "hello")


def test_the_answer_goes_to_stdout_and_the_reasoning_to_stderr(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("run", "hello")
    assert (shown.code, shown.out) == (0, "You said: hello\n")
    assert shown.err == "Let me see.\nThat is easy.\n"


def test_quiet_and_stats(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    assert run_dsv4("run", "-q", "hello").err == ""
    shown = run_dsv4("run", "hello", "--stats", "--think", "off")
    assert (shown.out, shown.err) == ("You said: hello\n", "prompt 1 token, 2.0 tok/s · answer 3 tokens, 40.0 tok/s\n")


def test_options_reach_the_engine(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    run_dsv4("run", "hi", "--temp", "0", "--top-k", "5", "--seed", "1", "--max-tokens", "50", "--think-budget", "7",
             "--effort", "max", "-s", "Be brief.", "--stop", "A", "--stop", "B")
    call = fake_engine.calls[0]
    assert [message["content"] for message in call["messages"]] == ["Be brief.", "hi"]
    assert (call["sampling"].temperature, call["sampling"].top_k, call["sampling"].seed) == (0.0, 5, 1)
    assert (call["max_tokens"], call["think_budget"], call["think"], call["stop"]) == (50, 7, "max", ("A", "B"))


def test_what_nobody_chose_is_left_to_the_engine(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    run_dsv4("run", "hi")
    assert set(fake_engine.calls[0]) == {"messages", "think", "sampling", "max_tokens"}


def test_json_is_one_record_a_line_with_fixed_names(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("run", "hello", "--json")
    records = [json.loads(line) for line in shown.out.splitlines()]
    assert shown.err == ""
    assert list(records[0]) == [
        "id", "text", "kind", "index", "prompt_tokens", "cached_tokens", "prompt_seconds", "decode_seconds", "prompt_tok_s",
        "decode_tok_s", "memory_bytes", "tool_calls", "finish"]
    assert "".join(record["text"] for record in records if record["kind"] == "answer") == "You said: hello"
    assert [record["finish"] for record in records] == [None] * (len(records) - 1) + ["stop"]


@pytest.mark.parametrize("arguments", [("run",), ("run", "hello"), ("chat",)])
def test_stdin_that_is_not_utf8_is_wrong_use(run_dsv4: Run, fake_engine: FakeEngine, arguments: tuple[str, ...]) -> None:
    shown = run_dsv4(*arguments, stdin=b"caf\xe9 au lait\n")
    assert shown.code == 2
    assert "not valid UTF-8: byte 0xe9 at offset 3." in shown.err
    assert fake_engine.calls == []


def test_a_prompt_that_is_not_utf8_is_wrong_use(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("run", "caf\udce9")
    assert (shown.code, fake_engine.calls) == (2, [])
    assert "argument 1 is not valid UTF-8" in shown.err


def test_a_byte_order_mark_is_not_text(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    assert run_dsv4("run", "-q", stdin=b"\xef\xbb\xbfhello").out == "You said: hello\n"


def test_a_prompt_longer_than_the_context(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    fake_engine.ctx = 3
    shown = run_dsv4("run", "one two three four")
    assert (shown.code, shown.out) == (2, "")
    assert "4 tokens do not fit into the context of 3." in shown.err


def test_ctrl_c_leaves_what_was_said_and_exits_130(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    plain_chat = fake_engine.chat

    def chat(*arguments: Any, **options: Any) -> Iterator[Token]:
        for index, token in enumerate(plain_chat(*arguments, **options)):
            if index == 2:
                signal.raise_signal(signal.SIGINT)
            yield token

    fake_engine.chat = chat  # type: ignore[method-assign]
    shown = run_dsv4("run", "--think", "off", "one two three")
    assert (shown.code, shown.out) == (130, "You said: one\n")


def test_a_cut_answer_is_called_cut(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("run", "--max-tokens", "2", "--think", "off", "one two")
    assert (shown.code, shown.out) == (0, "You said:\n")
    assert "cut off" in shown.err


def test_chat_from_a_pipe_answers_each_line_on_stdout(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("chat", stdin=b"hello\n/think off\n\nagain\r\n\"\"\"one\ntwo\"\"\"\n/bye\nnever\n")
    assert (shown.code, shown.out) == (0, "You said: hello\nYou said: again\nYou said: one\ntwo\n")
    assert "\x1b" not in shown.out + shown.err
    assert [call["think"] for call in fake_engine.calls] == ["high", "off", "off"]


def test_chat_from_a_pipe_ends_at_an_error(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    shown = run_dsv4("chat", "-q", stdin=b"hello\n/nonsense\nagain\n")
    assert (shown.code, shown.out) == (2, "You said: hello\n")
    assert "There is no command /nonsense" in shown.err


def test_a_named_session_is_kept_and_gone_on_with(run_dsv4: Run, fake_engine: FakeEngine) -> None:
    assert run_dsv4("chat", "--session", "mine", stdin=b"hello\n").code == 0
    assert run_dsv4("chat", "--session", "mine", stdin=b"again\n").code == 0
    assert [message["content"] for message in fake_engine.calls[1]["messages"]] == ["hello", "You said: hello", "again"]


def test_a_model_cannot_steer_the_terminal() -> None:
    from dsv4cli import console

    assert console.visible("a\x1b[2Jb\x07\x9b\x7f\tc\nd") == "a␛[2Jb␇\ufffd␡\tc\nd"
