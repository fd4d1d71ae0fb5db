"""The stream: prompt -> logits -> sampler -> Token, one record per token, until something ends it.

What ends it: a stop token, a stop string in the answer, a complete block of tool calls, max_tokens, the end of the
context, or the caller. However it ends, every token that was handed out is in the session, so the next prompt can go on
from there (save the last one, which nothing was computed after).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from threading import Event
from typing import Any

from dsv4cli.encoding import texts
from dsv4cli.encoding.parser import CompletionParser, Delta
from dsv4cli.engine.clock import Clock, rate
from dsv4cli.engine.memory import resident_bytes
from dsv4cli.engine.records import Finish, Kind, Token
from dsv4cli.engine.sampler import Sampler
from dsv4cli.engine.session import Progress, Session
from dsv4cli.engine.stops import StopStrings
from dsv4cli.errors import Interrupted, UsageError

Cancel = Event | Callable[[], bool]
Piece = tuple[Kind, str]
KINDS: dict[str, Kind] = {"reasoning": "reasoning", "content": "answer", "tool_call": "tool_call"}


def generate(session: Session, prompt_ids: Sequence[int], sampler: Sampler, *, parser: CompletionParser,
             max_tokens: int | None = None, stop_ids: Collection[int] = (), stop_strings: Sequence[str] = (),
             think_budget: int | None = None, cancel: Cancel | None = None, marks: Iterable[int] = (),
             progress: Progress | None = None) -> Iterator[Token]:
    """Continues `prompt_ids`; yields a record per token, the last one with `finish`.

    parser        tells reasoning, answer and tool calls apart
    max_tokens    None: until the context is full
    stop_strings  looked for in the answer only, and never shown
    think_budget  after so many tokens of reasoning it is closed, and the answer begins
    cancel        an Event or a question, looked at before every token and every chunk of the prompt
    marks         positions in the prompt worth a snapshot; progress(done, all) is told about the prompt
    Raises UsageError for an impossible limit or what Session.sync refuses.
    """
    _demand_limits(max_tokens, think_budget)
    stopped = _as_question(cancel)
    scribe = Scribe(session, parser, stop_ids, stop_strings, max_tokens, think_budget, len(prompt_ids))
    return _generate(session, prompt_ids, sampler, scribe, tuple(marks), stopped, progress)


def _generate(session: Session, prompt_ids: Sequence[int], sampler: Sampler, scribe: Scribe, marks: Sequence[int],
              stopped: Callable[[], bool], progress: Progress | None) -> Iterator[Token]:
    clock = scribe.clock
    try:
        with clock.prompt():
            logits = session.sync(prompt_ids, marks=marks, progress=progress, cancel=stopped)
        while not scribe.finish:
            _go_on_unless(stopped)
            with clock.decode():
                token = scribe.forced()
                token = sampler(logits, session.ids) if token is None else token
            yield from scribe.write(token)
            if not scribe.finish:
                with clock.decode():
                    logits = session.step(token)
    except Interrupted:
        yield from scribe.close("cancelled")


class Scribe:
    """Turns ids into records: reads them with the parser, counts, and says when it is over (`finish`)."""

    def __init__(self, session: Session, parser: CompletionParser, stop_ids: Collection[int],
                 stop_strings: Sequence[str], max_tokens: int | None, think_budget: int | None,
                 prompt_tokens: int) -> None:
        self.clock = Clock()
        self.finish: Finish | None = None
        self._session = session
        self._parser = parser
        self._stop_ids = frozenset(stop_ids)
        self._stops = StopStrings(stop_strings)
        self._max_tokens = max_tokens
        self._think_budget = think_budget
        self._prompt_tokens = prompt_tokens
        self._count = 0
        self._kind: Kind = "reasoning" if parser.thinking else "answer"  # of the text last seen

    def forced(self) -> int | None:
        """The token that must come next whatever the model would say: `</think>` once the budget is used up."""
        if self._think_budget is None or not self._parser.thinking or self._count < self._think_budget:
            return None
        return self._session.engine.tokenizer.control(texts.END_THINK)

    def write(self, token: int) -> Iterator[Token]:
        """The record of a chosen token; records without an id follow when its text is of more than one kind."""
        self._count += 1
        pieces = [] if token in self._stop_ids else self._read(token)
        finish = self._reason_to_end(token)
        return self._records(token, pieces, finish) if finish is None else self._last_records(token, pieces, finish)

    def close(self, finish: Finish) -> Iterator[Token]:
        """The final record when no token brings it."""
        return self._last_records(None, [], finish)

    def _read(self, token: int) -> list[Piece]:
        return self._sorted(self._parser.push(token))

    def _sorted(self, deltas: Iterable[Delta]) -> list[Piece]:
        """Deltas as pieces of text by kind; the answer's text passes through the stop strings."""
        pieces: list[Piece] = []
        for delta in deltas:
            kind = KINDS[delta.kind]
            if self._stops.hit:
                break
            if self._kind == "answer" != kind:
                pieces.append(("answer", self._stops.flush()))
            pieces.append((kind, self._stops.push(delta.text) if kind == "answer" else delta.text))
            self._kind = kind
        return pieces

    def _reason_to_end(self, token: int) -> Finish | None:
        if token in self._stop_ids or self._stops.hit or self._parser.done:
            return "stop"
        if self._count == self._max_tokens or not self._session.room:
            return "length"
        return None

    def _last_records(self, token: int | None, pieces: list[Piece], finish: Finish) -> Iterator[Token]:
        """With what was held back. Calls are the reason for an end that was not forced."""
        pieces = [*pieces, *self._sorted(self._parser.finish(finish)), ("answer", self._stops.flush())]
        calls = self._parser.result.tool_calls
        self.finish = "tool_calls" if calls and finish == "stop" else finish
        return self._records(token, pieces, self.finish, calls)

    def _records(self, token: int | None, pieces: list[Piece], finish: Finish | None = None,
                 calls: Sequence[dict[str, Any]] = ()) -> Iterator[Token]:
        joined = [(kind, "".join(text for _, text in group)) for kind, group in groupby(pieces, key=itemgetter(0))]
        told = [(kind, text) for kind, text in joined if text] or [(self._kind, "")]
        for place, (kind, text) in enumerate(told):
            last = place == len(told) - 1
            yield self._record(None if place else token, text, kind, finish if last else None, calls if last else ())

    def _record(self, token: int | None, text: str, kind: Kind, finish: Finish | None,
                calls: Sequence[dict[str, Any]]) -> Token:
        session, clock = self._session, self.clock
        return Token(
            token, text, kind, index=self._count - 1, prompt_tokens=self._prompt_tokens, cached_tokens=session.reused,
            prompt_seconds=clock.prompt_seconds, decode_seconds=clock.decode_seconds,
            prompt_tok_s=rate(self._prompt_tokens - session.reused, clock.prompt_seconds),
            decode_tok_s=rate(self._count - 1, clock.decode_seconds),
            memory_bytes=session.engine.weight_bytes + session.nbytes, rss_bytes=resident_bytes(),
            tool_calls=list(calls), finish=finish, unrecorded=session.unrecorded)


def _go_on_unless(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Interrupted("Stopped.")


def _as_question(cancel: Cancel | None) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    return cancel.is_set if isinstance(cancel, Event) else cancel


def _demand_limits(max_tokens: int | None, think_budget: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, but it must be 1 or more.",
                         "Leave it out to use the room there is.")
    if think_budget is not None and think_budget < 0:
        raise UsageError(f"The think budget is {think_budget}, but it must be 0 or more.",
                         "0 closes the reasoning at once.")
