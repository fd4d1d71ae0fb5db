"""An engine without a model: it answers by rote, a word per record, so that the chat can be tested to the character."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4cli.engine.records import Token
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import UsageError

Message = dict[str, Any]


@dataclass
class FakeSession:
    position: int = 0


@dataclass
class FakeEngine:
    """Answers with `answers[question]`, else with an echo; thinks first unless told not to; keeps what it was asked.

    delay: seconds per word. A prompt longer than `ctx` words is refused, as the real engine refuses tokens.
    """

    answers: dict[str, str] = field(default_factory=dict)
    reasoning: str = "Let me see.\nThat is easy."
    delay: float = 0.0
    name: str = "fake"
    release: str = "april"
    ctx: int = 1000
    sampling: Sampling = field(default_factory=Sampling)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def session(self) -> FakeSession:
        return FakeSession()

    def chat(self, messages: Sequence[Message], *, think: str = "high", session: FakeSession | None = None,
             cancel: Callable[[], bool] | None = None, progress: Callable[[int, int], None] | None = None,
             max_tokens: int | None = None, **options: Any) -> Iterator[Token]:
        """As dsv4cli.engine.Engine.chat."""
        asked = [dict(message) for message in messages]
        self.calls.append({"messages": asked, "think": think, "max_tokens": max_tokens, **options})
        prompt = sum(len(message["content"].split()) for message in messages)
        if prompt > self.ctx:
            raise UsageError(f"{prompt} tokens do not fit into the context of {self.ctx}.", "Shorten the prompt.")
        question = messages[-1]["content"]
        script = [("answer", word) for word in _words(self.answers.get(question, f"You said: {question}"))]
        if think != "off":
            script = [("reasoning", word) for word in _words(self.reasoning)] + script
        for index, (kind, text) in enumerate(script):
            if cancel is not None and cancel():
                yield _token(None, "", kind, index, prompt, "cancelled")
                return
            time.sleep(self.delay)
            full = max_tokens is not None and index + 1 >= max_tokens
            last = index + 1 == len(script)
            yield _token(index, text, kind, index, prompt, "stop" if last else "length" if full else None)
            if full:
                return
        if session is not None:
            session.position = prompt + len(script)


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*$|\s*\S+", text)


def _token(number: int | None, text: str, kind: Any, index: int, prompt: int, finish: Any) -> Token:
    return Token(number, text, kind, index, prompt, 0, 0.5, 0.25, prompt / 0.5, 40.0, 1000, finish=finish)
