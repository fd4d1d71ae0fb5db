"""Records a real chat with the embedded model on a pseudo-terminal, as plain text, for the README.

python -m tools.record_screen ["question" ...]
"""

from __future__ import annotations

import sys
import time

from tests.support.terminal import Terminal

QUESTIONS = [
    "Hello, my name is Anna.",
    "What is 27 + 35?",
    "/think off",
    "What is the capital of France?",
    "What is my name?",
    "/set stats on",
    "What is the capital of Japan?",
]


def record(questions: list[str]) -> str:
    """Everything on the screen after the questions were asked and the chat was left."""
    terminal = Terminal(["-m", "dsv4cli", "chat", "tiny"], columns=84, rows=60)
    terminal.wait_for_prompt()
    for question in questions:
        terminal.type(question + "\r")
        time.sleep(1.0)  # until the prompt that is still there has become a line with the question
        terminal.wait_for_prompt()
    terminal.type("/bye\r")
    terminal.wait_for_end()
    return terminal.everything()


if __name__ == "__main__":
    print(record(sys.argv[1:] or QUESTIONS))
