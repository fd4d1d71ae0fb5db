"""One question put to the engine: settings become its arguments, records become a reply, Ctrl-C ends it politely.

`run` and the chat both answer through `answer`; what is drawn is up to the view they pass.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import Dsv4Error
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine.records import Token

Cancel = Callable[[], bool]
SAMPLING = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "top_k": "top_k",
            "repeat_penalty": "repetition_penalty", "seed": "seed"}  # a setting's name -> Sampling's


class View(Protocol):
    """Whoever draws an answer: `read` hears how many tokens of the prompt are computed, `show` gets every record."""

    def read(self, done: int, whole: int) -> None: ...
    def show(self, token: Token) -> None: ...


class Engine(Protocol):
    """What a conversation needs of an engine; the real one is dsv4cli.engine.Engine."""

    @property
    def name(self) -> str: ...
    @property
    def release(self) -> str: ...
    @property
    def ctx(self) -> int: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def chat(self) -> Callable[..., Iterator[Token]]: ...
    def session(self) -> Any: ...


@dataclass
class Reply:
    """What came back: texts by kind, tool calls, and the last record with counts, rates and the reason for the end."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    last: Token | None = None

    def take(self, token: Token) -> None:
        if token.kind == "reasoning":
            self.reasoning += token.text
        elif token.kind == "answer":
            self.content += token.text
        self.tool_calls = token.tool_calls or self.tool_calls
        self.last = token

    @property
    def cancelled(self) -> bool:
        return self.last is None or self.last.finish in (None, "cancelled")


def sampling(engine: Engine, settings: Settings, attempt: int = 0) -> Sampling:
    """What was chosen, over what the model's authors recommend.

    Another attempt at a question moves a fixed seed, or it would say the same. Raises UsageError for an impossible value.
    """
    values = {SAMPLING[name]: value for name, value in settings.chosen(*SAMPLING).items()}
    if attempt and "seed" in values:
        values["seed"] += attempt
    return replace(engine.sampling, **values)


def answer(engine: Engine, messages: Sequence[dict[str, Any]], settings: Settings, view: View, *, session: Any = None,
           attempt: int = 0) -> Reply:
    """Streams the answer to `messages` through `view` and returns it whole.

    The first Ctrl-C asks the engine to stop after the token at hand; the second raises KeyboardInterrupt. Either way
    the session stays usable. Raises what the engine raises, as UsageError for a conversation longer than the context.
    """
    reply = Reply()
    with stop_on_interrupt() as cancel:
        lengths = settings.chosen("max_tokens", "stop", "think_budget")
        for token in engine.chat(messages, think=settings["think"], sampling=sampling(engine, settings, attempt),
                                 session=session, cancel=cancel, progress=view.read, **lengths):
            reply.take(token)
            view.show(token)
    return reply


def rates(token: Token) -> str:
    """One line on how fast it went: 'prompt 45 tokens (30 cached), 120.0 tok/s · answer 57 tokens, 33.1 tok/s'; and why it
    could not be faster, where decoded tokens are described one by one."""
    cached = f" ({token.cached_tokens} cached)" if token.cached_tokens else ""
    speed = f", {token.prompt_tok_s:.1f} tok/s" if token.cached_tokens < token.prompt_tokens else ""
    prompt, count = tokens(token.prompt_tokens), tokens(token.index + 1)
    slow = f" · decoded tokens are not replayed: {token.unrecorded}" if token.unrecorded else ""
    return f"prompt {prompt}{cached}{speed} · answer {count}, {token.decode_tok_s:.1f} tok/s{slow}"


def tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def describe_call(call: dict[str, Any]) -> str:
    """A tool call in one line: 'calls weather({"city": "Paris"})'."""
    function = call.get("function", {})
    return f"calls {function.get('name')}({function.get('arguments')})"


@contextmanager
def stop_on_interrupt() -> Iterator[Cancel]:
    """Turns the first Ctrl-C inside the block into a flag. (Outside the main thread there are no signals to turn.)"""
    stopped = False

    def first(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    try:
        before = signal.signal(signal.SIGINT, first)
    except ValueError:
        yield lambda: stopped
        return
    try:
        yield lambda: stopped
    finally:
        signal.signal(signal.SIGINT, before)


def demand_answer(reply: Reply) -> Reply:
    """The reply, or Dsv4Error if the engine ended without one record."""
    if reply.last is None:
        raise Dsv4Error("The model gave no answer at all.", "Run it again with --debug and report it.")
    return reply
