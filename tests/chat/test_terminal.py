"""The chat in a real terminal: what a person types, sees and scrolls back to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsv4cli import paths

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are a Unix thing", allow_module_level=True)

from tests.support.terminal import Terminal

PROGRAM = str(Path(__file__).with_name("fake_chat.py"))
Start = Callable[..., Terminal]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(seconds per word, size, environment) -> a terminal whose chat waits for its first question."""
    opened: list[Terminal] = []

    def run(delay: float = 0.0, **options: object) -> Terminal:
        opened.append(Terminal([PROGRAM, str(delay)], **options))  # type: ignore[arg-type]
        opened[-1].wait_for_prompt()
        return opened[-1]

    yield run
    for terminal in opened:
        terminal.close()


def test_header_question_reasoning_and_answer(start: Start) -> None:
    terminal = start()
    assert "│ release  april        │" in terminal.lines()
    terminal.type("hello\r")
    terminal.wait_for("You said: hello")
    terminal.wait_for_prompt()
    shown = terminal.lines()
    begin = shown.index(">>> hello")
    assert shown[begin:begin + 7] == [
        ">>> hello", "Let me see.", "That is easy.", "thought for 0 s, 6 tokens", "", "You said: hello", ""]


def test_the_answer_appears_while_it_is_made_with_a_clock_before_it(start: Start) -> None:
    terminal = start(delay=0.1)
    terminal.type("a b c d e f g h\r")
    terminal.wait_for("thinking… ")
    terminal.wait_for("You said: a b c")
    assert "d e f g h" not in terminal.shown().replace(">>> a b c d e f g h", "")
    terminal.wait_for("You said: a b c d e f g h")


def test_markdown_is_drawn_once_and_stays(start: Start) -> None:
    terminal = start(delay=0.01, rows=14)
    terminal.type("markdown\r")
    terminal.wait_for("The end.")
    terminal.wait_for_prompt()
    text = terminal.everything()
    answer = text[text.index("Title"):]
    assert [line for line in answer.splitlines() if line.strip()] == [
        "Title", "Some bold words and code,", "in two lines.", " • one", " • two", " print(vector<int>)", "The end.", ">>>"]


def test_an_answer_longer_than_the_screen_is_whole_in_the_scrollback(start: Start) -> None:
    terminal = start(delay=0.001, columns=50, rows=12)
    terminal.type("long\r")
    terminal.wait_for("word399")
    terminal.wait_for_prompt()
    text = terminal.everything()
    words = [word for word in text[text.index("word0"):].split() if word.startswith("word")]
    assert words == [f"word{number}" for number in range(400)]


def test_ctrl_c_stops_the_answer_and_not_the_chat(start: Start) -> None:
    terminal = start(delay=0.05)
    terminal.type("long\r")
    terminal.wait_for("word5")
    terminal.type("\x03")
    terminal.wait_for("Stopped. The answer so far is kept")
    terminal.type("/undo\r")
    terminal.wait_for("Taken back: long")
    terminal.type("hello\r")
    terminal.wait_for("You said: hello")


def test_commands_and_leaving(start: Start) -> None:
    terminal = start()
    terminal.type("/thnk\r")
    terminal.wait_for("hint: Did you mean /think?")
    terminal.type("/think off\r")
    terminal.wait_for("Thinking is off.")
    terminal.type("hello\r")
    terminal.wait_for("You said: hello")
    assert "thought for" not in terminal.shown()
    terminal.type("/bye\r")
    assert terminal.wait_for_end() == 0


def test_ctrl_c_drops_the_line_then_warns_then_leaves(start: Start) -> None:
    terminal = start()
    terminal.type("never sent\x03")
    terminal.wait_until(lambda: ">>> never sent" not in terminal.lines(), "the line was not dropped")
    terminal.type("\x03")
    terminal.wait_for("Press Ctrl-C again or type /bye to leave.")
    terminal.wait_for_prompt()
    terminal.type("\x03")
    assert terminal.wait_for_end() == 0


def test_ctrl_d_leaves(start: Start) -> None:
    terminal = start()
    terminal.type("\x04")
    assert terminal.wait_for_end() == 0


def test_several_lines_by_quotes_by_alt_enter_and_by_pasting(start: Start) -> None:
    terminal = start()
    terminal.type('"""one\r')
    terminal.wait_for("\n...")
    terminal.type('two"""\r')
    terminal.wait_for("You said: one\ntwo")
    terminal.wait_for_prompt()
    terminal.type("three\x1b\rfour\r")
    terminal.wait_for("You said: three\nfour")
    terminal.wait_for_prompt()
    terminal.type("\x1b[200~five\nsix\x1b[201~\r")
    terminal.wait_for("You said: five\nsix")


def test_history_outlives_the_program(start: Start) -> None:
    first = start()
    first.type("remember me\r")
    first.wait_for("You said: remember me")
    first.type("/bye\r")
    assert first.wait_for_end() == 0
    assert paths.history().stat().st_mode & 0o077 == 0
    second = start()
    second.type("\x1b[A\x1b[A")
    second.wait_for(">>> remember me")


def test_tab_completes_commands(start: Start) -> None:
    terminal = start()
    terminal.type("/sta\t")
    terminal.wait_for(">>> /status")


def test_the_cursor_is_visible_again_and_keys_are_echoed_after_an_answer(start: Start) -> None:
    terminal = start()
    terminal.type("hello\r")
    terminal.wait_for("You said: hello")
    terminal.wait_for_prompt()
    assert terminal.written.rindex(b"\x1b[?25h") > terminal.written.rindex(b"\x1b[?25l")
    terminal.type("echoed")
    terminal.wait_for(">>> echoed")


def test_a_remark_in_the_middle_of_an_answer_stands_above_it(start: Start) -> None:
    """Written past the region it would be drawn over, or the region drawn into it."""
    terminal = start(delay=0.02)
    terminal.type("remark two three four five six\r")
    terminal.wait_for("You said: remark two three four five six")
    terminal.wait_for_prompt()
    shown = terminal.lines()
    begin = shown.index("The GPU has less free memory.")
    assert shown[begin:begin + 2] == ["The GPU has less free memory.", "You said: remark two three four five six"]
    assert terminal.shown().count("You said:") == 1


def test_no_color_means_no_escape_sequences(start: Start) -> None:
    terminal = start(env={"NO_COLOR": "1"})
    terminal.type("markdown\r")
    terminal.wait_for("The end.")
    terminal.type("\x04")
    assert terminal.wait_for_end() == 0
    assert b"\x1b" not in terminal.written
    assert "Some **bold** words" in terminal.everything()


def test_a_resized_window_does_not_lose_the_answer(start: Start) -> None:
    terminal = start(delay=0.02)
    terminal.type("a b c d e f g h i j k l m n o p q r s t u v w x y z the end\r")
    terminal.wait_for("You said: a b")
    terminal.resize(60, 20)
    terminal.wait_for("z the end")
    terminal.wait_for_prompt()
    assert "You said: a b c d e f g h i j k l m n o p q r s t u v w x y" in terminal.shown()
