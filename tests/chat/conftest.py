"""A screen that records, and a chat over the fake engine that reads a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from dsv4cli import settings
from dsv4cli.chat.conversation import Conversation
from dsv4cli.chat.loop import talk as loop
from dsv4cli.engine.records import Token
from dsv4cli.errors import Dsv4Error
from tests.support.fake_engine import FakeEngine


@dataclass
class Recorder:
    """Reads `lines` (an exception among them is raised in its place) and keeps everything that was to be drawn."""

    lines: list[str | type[BaseException]]
    interactive: bool = True
    notes: list[str] = field(default_factory=list)
    errors: list[Dsv4Error] = field(default_factory=list)
    tables: list[dict[str, str]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def ask(self, continued: bool = False) -> str:
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def header(self, facts: list[tuple[str, str]]) -> None:
        self.tables.append(dict(facts))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def table(self, rows: list[tuple[str, str]]) -> None:
        self.tables.append(dict(rows))

    def failed(self, error: Dsv4Error) -> None:
        self.errors.append(error)

    @contextmanager
    def answering(self) -> Iterator[Recorder]:
        self.answers.append("")
        yield self

    def read(self, done: int, whole: int) -> None: ...

    def show(self, token: Token) -> None:
        if token.kind == "answer":
            self.answers[-1] += token.text


Talk = Callable[..., tuple[Conversation, Recorder]]


@pytest.fixture
def talk() -> Talk:
    """talk(lines, engine=..., interactive=..., **flags) -> (chat, screen) after the conversation."""

    def run(lines: Sequence[str | type[BaseException]], engine: FakeEngine | None = None, interactive: bool = True,
            **flags: object) -> tuple[Conversation, Recorder]:
        screen = Recorder(list(lines), interactive)
        chat = Conversation(engine or FakeEngine(), screen, settings.load(flags), lambda: [("model", "fake")],
                            lambda: [("layers", "none")])
        loop(chat)
        return chat, screen

    return run
