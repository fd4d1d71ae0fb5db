"""The chat's loop and its commands, over an engine that answers by rote."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4cli import paths
from dsv4cli.chat import slash, transcript, turn
from dsv4cli.engine.records import Token
from dsv4cli.errors import Interrupted, UsageError
from tests.chat.conftest import Talk
from tests.support.fake_engine import FakeEngine


def contents(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_each_line_is_answered_with_the_conversation_before_it(talk: Talk) -> None:
    chat, screen = talk(["hello", "", "  ", "again"])
    assert screen.answers == ["You said: hello", "You said: again"]
    assert contents(chat.engine.calls[1]["messages"]) == [
        ("user", "hello"), ("assistant", "You said: hello"), ("user", "again")]
    assert chat.engine.calls[1]["messages"][1]["reasoning_content"] == "Let me see.\nThat is easy."


def test_three_quotes_begin_and_end_a_text_of_several_lines(talk: Talk) -> None:
    chat, _ = talk(['"""one', "", 'two"""', '"""single"""', '"""', "/bye", '"""'])
    assert [call["messages"][-1]["content"] for call in chat.engine.calls] == ["one\n\ntwo", "single", "/bye"]


@pytest.mark.parametrize("word", ["/bye", "/exit", "/quit", "/BYE", EOFError])
def test_ways_to_leave(talk: Talk, word: str) -> None:
    chat, screen = talk([word, "never read"])
    assert chat.engine.calls == []
    assert screen.lines == (["never read"])


def test_ctrl_c_twice_at_the_prompt_leaves_and_once_does_not(talk: Talk) -> None:
    _, screen = talk([KeyboardInterrupt, "still here", KeyboardInterrupt, KeyboardInterrupt, "never read"])
    assert screen.answers == ["You said: still here"]
    assert screen.lines == ["never read"]
    assert screen.notes == ["Press Ctrl-C again or type /bye to leave."] * 2


@pytest.mark.parametrize(("typed", "meant"), [("/thnk high", "/think"), ("/hepl", "/help"), ("/regenerate", "/regen")])
def test_unknown_commands_are_not_sent_and_the_nearest_is_named(talk: Talk, typed: str, meant: str) -> None:
    chat, screen = talk([typed])
    assert chat.engine.calls == []
    assert typed.split()[0] in screen.errors[0].message
    assert screen.errors[0].hint == f"Did you mean {meant}?"


def test_a_blank_before_the_slash_sends_the_line(talk: Talk) -> None:
    chat, _ = talk([" /etc/passwd is a file"])
    assert chat.engine.calls[0]["messages"][0]["content"] == " /etc/passwd is a file"


def test_help_names_every_command(talk: Talk) -> None:
    _, screen = talk(["/help", "/?"])
    assert [usage.split()[0] for usage in screen.tables[1]][:len(slash.COMMANDS)] == list(slash.COMMANDS)
    assert screen.tables[1] == screen.tables[2]


def test_think_changes_the_next_answer(talk: Talk) -> None:
    chat, screen = talk(["a", "/think off", "b", "/think max", "c", "/think", "/think hard", "/think low"])
    assert [call["think"] for call in chat.engine.calls] == ["high", "off", "max"]
    assert screen.notes == ["Thinking is off.", "Thinking is at max.", "Thinking is at max.",
                            "Thinking is at high (release april has no low)."]
    assert "must be off, low, high or max" in screen.errors[0].message


def test_system_stands_before_everything_and_can_be_taken_away(talk: Talk) -> None:
    chat, _ = talk(["a", "/system Be brief.", "b", "/clear", "c", "/system off", "d"])
    systems = [call["messages"][0]["content"] for call in chat.engine.calls if call["messages"][0]["role"] == "system"]
    assert systems == ["Be brief.", "Be brief."]
    assert len(chat.engine.calls[2]["messages"]) == 2  # the system prompt outlives /clear, the turns do not


def test_undo_takes_back_a_whole_turn(talk: Talk) -> None:
    chat, screen = talk(["first", "second", "/undo", "third", "/undo", "/undo", "/undo"])
    assert contents(chat.engine.calls[2]["messages"])[0] == ("user", "first")
    assert contents(chat.engine.calls[2]["messages"])[-1] == ("user", "third")
    assert len(chat.engine.calls[2]["messages"]) == 3
    assert screen.notes == ["Taken back: second", "Taken back: third", "Taken back: first"]
    assert screen.errors[0].message == "There is nothing to take back."


def test_regen_asks_the_same_again_with_another_seed(talk: Talk) -> None:
    chat, _ = talk(["hello", "/regen", "/regen", "next"], seed=7)
    first, second, third, fourth = chat.engine.calls
    assert first["messages"] == second["messages"] == third["messages"]
    assert [call["sampling"].seed for call in (first, second, third, fourth)] == [7, 8, 9, 7]
    assert len(chat.transcript.turns) == 4


def test_regen_without_a_question_says_so(talk: Talk) -> None:
    _, screen = talk(["/regen"])
    assert screen.errors[0].message == "There is no question to answer again."


def test_set_shows_changes_and_resets(talk: Talk) -> None:
    chat, screen = talk(["/set temp 0.5", "/set top_p", "a", "/set temp default", "b", "/set max_tokens 3", "c", "/set"])
    assert [call["sampling"].temperature for call in chat.engine.calls] == [0.5, 1.0, 1.0]
    assert [call["max_tokens"] for call in chat.engine.calls] == [None, None, 3]
    assert screen.notes[:2] == ["temp is 0.5.", "top_p is 1."]
    assert screen.tables[-1]["max_tokens"] == "3"


@pytest.mark.parametrize(("line", "sentence"), [
    ("/set tmep 1", "There is no setting tmep."),
    ("/set temp warm", "/set temp is 'warm', but it must be a number from 0 to 100."),
    ("/set top_p 0", "top_p is 0.0, but it must be above 0"),
    ("/set ctx 5", "ctx is chosen when the model is opened."),
])
def test_set_refuses(talk: Talk, line: str, sentence: str) -> None:
    chat, screen = talk([line, "a"])
    assert sentence in screen.errors[0].message
    assert chat.engine.calls[0]["sampling"].temperature == 1.0


def test_stats_on_request(talk: Talk) -> None:
    _, screen = talk(["a", "/set stats on", "b c"])
    assert screen.notes == ["stats is on.", "prompt 6 tokens, 12.0 tok/s · answer 10 tokens, 40.0 tok/s"]


def test_stats_tell_why_decoding_is_slower_than_it_could_be() -> None:
    token = Token(1, "a", "answer", 0, 6, 0, 0.5, 0.25, 12.0, 40.0, 1000, finish="stop")
    assert turn.rates(replace(token, unrecorded="it waits for the card")) == (
        f"{turn.rates(token)} · decoded tokens are not replayed: it waits for the card")


def test_status_and_show(talk: Talk) -> None:
    _, screen = talk(["hello", "/status", "/show"])
    assert screen.tables[1]["messages"] == "2"
    assert screen.tables[1]["context"] == "10 of 1,000 tokens used, 990 free"
    assert (screen.tables[0], screen.tables[2]) == ({"model": "fake"}, {"layers": "none"})


def test_read_joins_a_file_to_the_next_message_or_asks_at_once(talk: Talk, tmp_path: Path) -> None:
    notes = tmp_path / "my notes.txt"
    notes.write_text("The sea is blue.\n", encoding="utf-8")
    chat, screen = talk([f'/read "{notes}"', "What colour?", f'/read "{notes}" And now?', "plain"])
    asked = [call["messages"][-1]["content"] for call in chat.engine.calls]
    assert asked == ["The sea is blue.\n\nWhat colour?", "The sea is blue.\n\nAnd now?", "plain"]
    assert screen.notes == [f"Read {notes}, 16 characters. It goes with your next message."]


def test_read_refuses_what_is_not_there_or_not_text(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"ok \xff")
    chat, screen = talk(["/read", f"/read {tmp_path}/none", f"/read {tmp_path}/bad", f"/read {tmp_path}"])
    assert chat.engine.calls == []
    assert [error.message.partition(": ")[2] for error in screen.errors[1:]] == [
        "No such file or directory.", "byte 0xff at offset 3.", "Is a directory."]


def test_save_keeps_after_every_answer_and_load_goes_on(talk: Talk) -> None:
    chat, _ = talk(["/system Be brief.", "hello", "/save first", "again"])
    assert len(transcript.load(transcript.path_of("first")).turns) == 4
    later, screen = talk(["/load first", "and now"])
    assert contents(later.engine.calls[0]["messages"]) == [
        ("system", "Be brief."), ("user", "hello"), ("assistant", "You said: hello"), ("user", "again"),
        ("assistant", "You said: again"), ("user", "and now")]
    assert screen.notes == ["Loaded first: 4 messages. The last question was: again"]
    assert chat.name == later.name == "first"


def test_save_does_not_overwrite_another_conversation(talk: Talk) -> None:
    talk(["one", "/save mine"])
    _, screen = talk(["two", "/save mine", "/load yours", "/save ../mine", "/save", "/load"])
    assert [error.message for error in screen.errors] == [
        "There is already a conversation mine.", "There is no saved conversation yours.",
        "'../mine' cannot be the name of a conversation.", "A name is missing: /save NAME.", "A name is missing: /load NAME."]
    assert screen.errors[1].hint == "Saved conversations: mine."
    assert transcript.load(transcript.path_of("mine")).question == "one"
    assert [file.name for file in paths.sessions().iterdir()] == ["mine.json"]


class Interrupting(FakeEngine):
    """Presses Ctrl-C once `after` records are out: as the user would, in the middle of an answer."""

    after = 0

    def chat(self, *args: Any, **options: Any) -> Iterator[Token]:
        for index, token in enumerate(super().chat(*args, **options)):
            if index == self.after and self.after >= 0:
                signal.raise_signal(signal.SIGINT)
                self.after = -1
            yield token


def interrupting(after: int) -> Interrupting:
    engine = Interrupting()
    engine.after = after
    return engine


def test_ctrl_c_keeps_an_answer_that_has_begun(talk: Talk) -> None:
    chat, screen = talk(["one two three", "next"], interrupting(7))
    assert contents(chat.transcript.turns)[:2] == [("user", "one two three"), ("assistant", "You said:")]
    assert screen.notes == ["Stopped. The answer so far is kept; /undo takes it back."]
    assert screen.answers[1] == "You said: next"


def test_ctrl_c_while_thinking_takes_the_question_back(talk: Talk) -> None:
    chat, screen = talk(["one", "next"], interrupting(2))
    assert contents(chat.transcript.turns) == [("user", "next"), ("assistant", "You said: next")]
    assert screen.notes == ["Stopped before an answer; the question is taken back."]


def test_a_stopped_regen_leaves_the_old_answer(talk: Talk) -> None:
    engine = interrupting(-1)
    chat, _ = talk(["one"], engine)
    before = list(chat.transcript.turns)
    engine.after = 1
    chat.regenerate()
    assert chat.transcript.turns == before


def test_from_a_pipe_ctrl_c_ends_the_program(talk: Talk) -> None:
    with pytest.raises(Interrupted):
        talk(["one", "never asked"], interrupting(7), interactive=False)


def test_errors_are_said_on_a_terminal_and_end_a_pipe(talk: Talk) -> None:
    chat, screen = talk(["one two three four", "short"], FakeEngine(ctx=3))
    assert screen.errors[0].message == "4 tokens do not fit into the context of 3."
    assert contents(chat.transcript.turns)[0] == ("user", "short")
    with pytest.raises(UsageError):
        talk(["one two three four", "short"], FakeEngine(ctx=3), interactive=False)


@pytest.mark.parametrize(("limit", "note"), [(8, "Cut off: the answer reached"), (2, "Cut off while thinking")])
def test_a_cut_answer_is_called_cut(talk: Talk, limit: int, note: str) -> None:
    _, screen = talk(["one two three"], max_tokens=limit)
    assert screen.notes[0].startswith(note)
