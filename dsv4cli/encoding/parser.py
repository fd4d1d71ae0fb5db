"""A completion taken apart while it is written (spec/encoding.md sections 9 and 10).

    completion := reasoning "</think>" answer [calls] EOS     thinking; the prompt has already opened the reasoning
                | answer [calls] EOS                          not thinking
    calls      := newlines "<｜DSML｜" tags                    see dsml.py

The parts come in this order and never go back: reasoning may be followed by calls at once, and behind the calls nothing
counts. Newlines around the reasoning, before the answer and before the calls belong to the format, not to the text, so
they are held back until something else follows. What a reader has been given is never taken back.

Two kinds of input are kept apart. `</think>` and `｜DSML｜` count where the model chose those very tokens
(`push`, `push_control`); the same characters made of ordinary tokens are text. Where a backend gives only text,
`spelled_controls=True` looks for the spellings.
"""

from __future__ import annotations

import re
import secrets
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

from dsv4cli.encoding.completion import Completion, Delta, ToolCall, finish_reason
from dsv4cli.encoding.dsml import CallReader
from dsv4cli.encoding.segments import Control, Segment, Text
from dsv4cli.encoding.strict import parse_strict
from dsv4cli.encoding.texts import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from dsv4cli.encoding.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Completion", "CompletionParser", "Delta", "ToolCall", "parse_strict"]

ENDS = (EOS, BOS, USER, ASSISTANT)


def random_call_id(index: int) -> str:
    """An id whose alphabetical order is the order of the calls."""
    return f"call_{index:02d}_{secrets.token_hex(10)}"


class CompletionParser:
    """Takes a completion piece by piece and gives out deltas; `result` is their sum.

    thinking        the prompt ended with `<think>`; afterwards the property tells whether reasoning is still open
    tools_declared  without tools a block of calls is ordinary text
    call_id         makes the id of the call with this index
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        thinking: bool,
        tools_declared: bool,
        call_id: Callable[[int], str] | None = None,
        spelled_controls: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._speller = Speller() if spelled_controls else None
        self._calls = CallReader(call_id or random_call_id)
        self._tools_declared = tools_declared
        self._state: Literal["reasoning", "content", "calls", "done"] = "reasoning" if thinking else "content"
        self._part_begun = False  # until then newlines are dropped
        self._newlines = 0  # held back: they are the format's if `</think>` or calls follow
        self._opener = ""  # held back behind them: a "<" that may open the calls
        self._given: list[Delta] = []
        self._exact: list[str] = []
        self._finish_reason: str | None = None

    @property
    def thinking(self) -> bool:
        """Whether the reasoning is still open."""
        return self._state == "reasoning"

    @property
    def done(self) -> bool:
        """Whether nothing that may follow counts: the calls are closed, or the turn was ended."""
        return self._state == "done"

    @property
    def result(self) -> Completion:
        """All that was given out so far."""
        pieces: defaultdict[tuple[str, int | None], list[str]] = defaultdict(list)
        for delta in self._given:
            pieces[delta.kind, delta.index].append(delta.text)
        calls = [
            ToolCall(delta.id, delta.name, "".join(pieces["tool_call", delta.index]))
            for delta in self._given
            if delta.id is not None and delta.name is not None
        ]
        reasoning, content = "".join(pieces["reasoning", None]), "".join(pieces["content", None])
        return Completion(reasoning, content, calls, "".join(self._exact), self._finish_reason)

    def push(self, token: int) -> list[Delta]:
        """One sampled id. Needs the tokenizer."""
        if self._tokenizer is None or self._decoder is None:
            raise TypeError("CompletionParser.push needs a tokenizer; without one use push_text and push_control.")
        if token not in self._tokenizer.control_ids:
            return self.push_text(self._decoder.push(token))
        broken = self.push_text(self._decoder.flush())
        return broken + self.push_control(self._tokenizer.token_bytes(token).decode())

    def push_text(self, text: str) -> list[Delta]:
        """Text from ordinary tokens; with `spelled_controls` the control tokens are found in it."""
        self._exact.append(text)
        if self._speller:
            return self._give(self._read(self._speller.push(text)))
        return self._give(self._read([Text(text)]))

    def push_control(self, spelling: str) -> list[Delta]:
        """A control token that the model chose as one id."""
        self._exact.append(spelling)
        before = self._speller.flush() if self._speller else []
        return self._give(self._read([*before, Control(spelling)]))

    def finish(self, cause: str) -> list[Delta]:
        """The stream ended because of `cause` ("stop", "length", ...). What was held back comes out."""
        if self._finish_reason is not None:
            return []
        last = self.push_text(self._decoder.flush() if self._decoder else "")
        last += self._give(self._read(self._speller.flush() if self._speller else []))
        last += self._give(self._end())
        self._finish_reason = finish_reason(cause, self.result.calls)
        return last

    def _give(self, deltas: list[Delta]) -> list[Delta]:
        self._given += deltas
        return deltas

    def _read(self, segments: list[Segment]) -> list[Delta]:
        deltas: list[Delta] = []
        for segment in segments:
            deltas += self._control(segment.text) if isinstance(segment, Control) else self._text(segment.text)
        return deltas

    def _text(self, text: str) -> list[Delta]:
        if self._state == "done":
            return []
        if self._state == "calls":
            return self._within_calls(self._calls.text(text))
        text = self._opener + text
        if not self._part_begun:
            text = text.lstrip("\n")
            self._part_begun = bool(text)
        self._opener = "<" if self._tools_declared and text.endswith("<") else ""
        text = text.removesuffix(self._opener)
        sure = text.rstrip("\n") if self._tools_declared or self._state == "reasoning" else text
        if not sure:
            self._newlines += len(text)
            return []
        before, self._newlines = "\n" * self._newlines, len(text) - len(sure)
        return self._spoken(before + sure)

    def _control(self, spelling: str) -> list[Delta]:
        if spelling in ENDS:
            return self._end()
        if spelling == DSML:
            return self._mark()
        if spelling == END_THINK and self._state in ("reasoning", "content"):
            return self._end_reasoning()
        if spelling in (THINK, END_THINK):
            return self._text(spelling)
        return []  # placeholders, tasks, images: nothing that a reader should see

    def _mark(self) -> list[Delta]:
        if self._state == "calls":
            return self._within_calls(self._calls.mark())
        if not self._opener:
            return self._text(DSML)
        self._state, self._newlines, self._opener = "calls", 0, ""
        return []

    def _end_reasoning(self) -> list[Delta]:
        """`</think>`. A second one, or one without reasoning, vanishes, but no tag grows together across it."""
        rest = self._release() if self._opener else []
        if self._state == "reasoning":
            self._state, self._part_begun, self._newlines = "content", False, 0
        return rest

    def _within_calls(self, deltas: list[Delta]) -> list[Delta]:
        if self._calls.ended:
            self._state = "done"
        return deltas

    def _end(self) -> list[Delta]:
        if self._state == "done":
            return []
        rest = self._calls.flush() if self._state == "calls" else self._release()
        self._state = "done"
        return rest

    def _release(self) -> list[Delta]:
        """What was held back is text after all."""
        held = "\n" * self._newlines + self._opener
        self._newlines, self._opener = 0, ""
        return self._spoken(held)

    def _spoken(self, text: str) -> list[Delta]:
        return [Delta("reasoning" if self._state == "reasoning" else "content", text)] if text else []


class Speller:
    """Finds control tokens by their spelling in text that comes in pieces; holds back what may become one."""

    SPELLINGS = (END_THINK, DSML, EOS)
    PATTERN = re.compile("(" + "|".join(SPELLINGS) + ")")

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Segment]:
        *pieces, rest = self.PATTERN.split(self._held + text)
        self._held = self._beginning(rest)
        found: list[Segment] = [Control(piece) if piece in self.SPELLINGS else Text(piece) for piece in pieces]
        return [*found, Text(rest.removesuffix(self._held))]

    def flush(self) -> list[Segment]:
        held, self._held = self._held, ""
        return [Text(held)]

    def _beginning(self, text: str) -> str:
        """The longest end of `text` that is the beginning of a spelling."""
        longest = max(map(len, self.SPELLINGS)) - 1
        ends = (text[-size:] for size in range(min(longest, len(text)), 0, -1))
        return next((end for end in ends if any(spelling.startswith(end) for spelling in self.SPELLINGS)), "")
