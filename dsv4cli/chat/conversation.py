"""One conversation under way: the engine that answers, the screen that draws, the transcript that keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsv4cli.chat import transcript, turn
from dsv4cli.chat.transcript import Message, Transcript
from dsv4cli.chat.turn import Engine, Reply, View
from dsv4cli.errors import Dsv4Error, Interrupted
from dsv4cli.settings import Settings

Facts = list[tuple[str, str]]


class Screen(Protocol):
    """What a conversation needs of a screen: chat.screen draws on a terminal, chat.plain writes lines."""

    interactive: bool

    def ask(self, continued: bool = False) -> str: ...
    def header(self, facts: Facts) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, rows: Facts) -> None: ...
    def failed(self, error: Dsv4Error) -> None: ...
    def answering(self) -> AbstractContextManager[View]: ...


@dataclass
class Conversation:
    """What `loop` and the slash commands act on.

    facts    what the header says about the model; details: what /show says
    name     under which the conversation is kept after every turn; "" while it has none
    """

    engine: Engine
    screen: Screen
    settings: Settings
    facts: Callable[[], Facts] = list
    details: Callable[[], Facts] = list
    name: str = ""
    transcript: Transcript = field(default_factory=Transcript)
    attached: str = ""  # from /read, waiting for its question
    attempt: int = 0  # how often the last question was asked again
    last: Reply | None = None
    leaving: bool = False

    def __post_init__(self) -> None:
        self.session: Any = self.engine.session()

    def say(self, text: str) -> None:
        """Puts a question to the model, after what /read attached, and draws the answer."""
        question = f"{self.attached}\n\n{text}" if self.attached else text
        self.attached, self.attempt = "", 0
        before = list(self.transcript.turns)
        self.transcript.ask(question)
        self._answer(before)

    def regenerate(self) -> None:
        """Asks the last question once more."""
        before = list(self.transcript.turns)
        self.transcript.ask(self.transcript.undo())
        self.attempt += 1
        self._answer(before)

    def forget(self) -> None:
        """Begins anew with the same system prompt."""
        self.transcript.clear()
        self.session = self.engine.session()
        self.attached, self.attempt, self.last = "", 0, None

    def keep(self, name: str) -> None:
        """Writes the conversation under `name`, and from now on after every turn."""
        path = transcript.path_of(name)
        transcript.save(self.transcript, path, model=self.engine.name, release=self.engine.release)
        self.name = name

    def _answer(self, before: list[Message]) -> None:
        """Draws the answer to the transcript's last question. If there is none, the transcript is again as `before`."""
        reply = None
        try:
            with self.screen.answering() as view:
                reply = turn.answer(self.engine, self.transcript.messages, self.settings, view, session=self.session,
                                    attempt=self.attempt)
        finally:
            self.last = reply
            if reply and (reply.content or reply.tool_calls):
                self.transcript.answer(reply.content, reply.reasoning, reply.tool_calls)
            else:
                self.transcript.turns = before
        self._close(reply)

    def _close(self, reply: Reply) -> None:
        finish = reply.last.finish if reply.last else None
        if reply.cancelled:
            if not self.screen.interactive:
                raise Interrupted("Interrupted.")
            self.screen.note("Stopped. The answer so far is kept; /undo takes it back." if reply.content
                             else "Stopped before an answer; the question is taken back.")
        elif finish == "length":
            self.screen.note("Cut off: the answer reached --max-tokens or the end of the context." if reply.content else
                             "Cut off while thinking, so there is no answer; /set max_tokens higher, or /think off.")
        if self.settings["stats"] and reply.last:
            self.screen.note(turn.rates(reply.last))
        if self.name:
            self.keep(self.name)
