"""One turn of a conversation: messages become a prompt, the prompt an answer.

The words of earlier answers are put back as the very ids that were sampled, where the session still holds them. A text
has many spellings in tokens and the model does not always choose the one that the tokenizer would; without this the
next prompt would leave the timeline somewhere inside the answer, and everything after would be computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4cli.encoding import texts
from dsv4cli.encoding.parser import CompletionParser
from dsv4cli.encoding.segments import Control, Rendered, Text
from dsv4cli.encoding.template import render, think_level
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.engine.loaded import Loaded
from dsv4cli.engine.records import Token
from dsv4cli.engine.sampler import make_sampler
from dsv4cli.engine.sampling import Sampling
from dsv4cli.engine.session import Progress, Session
from dsv4cli.engine.stream import Cancel, generate

Message = dict[str, Any]
SPEECH = (texts.THINK, texts.END_THINK, texts.DSML)  # after these the model's own words follow
SAYABLE = (texts.EOS, texts.USER, texts.ASSISTANT, *SPEECH)  # the control tokens that an answer may contain or end with
SHARED_PROMPT = 64  # tokens before the first question from which on they are worth a snapshot


@dataclass(frozen=True)
class Prompt:
    """ids of the rendered messages; marks: positions where a later prompt may part from this one."""

    ids: list[int]
    marks: tuple[int, ...]
    thinking: bool
    effort: str | None


def answer(engine: Loaded, messages: Sequence[Message], *, session: Session, think: str,
           tools: Sequence[Message] | None, sampling: Sampling, max_tokens: int | None, stop: Sequence[str],
           think_budget: int | None, cancel: Cancel | None, progress: Progress | None) -> Iterator[Token]:
    """Renders `messages` and streams the answer. A bad request is refused here, not at the first token."""
    prompt = prompt_of(engine, messages, session=session, think=think, tools=tools)
    engine.check_ids(prompt.ids)
    parser = CompletionParser(engine.tokenizer, thinking=prompt.thinking, tools_declared=bool(tools))
    limit = default_max_tokens(prompt) if max_tokens is None else max_tokens
    return generate(session, prompt.ids, make_sampler(sampling, unsayable(engine)), parser=parser, max_tokens=limit,
                    stop_ids=engine.tokenizer.stop_ids, stop_strings=stop, think_budget=think_budget, cancel=cancel,
                    marks=prompt.marks, progress=progress)


def prompt_of(engine: Loaded, messages: Sequence[Message], *, session: Session, think: str,
              tools: Sequence[Message] | None) -> Prompt:
    """The prompt for an answer to `messages`, spelled as far as possible like the session's timeline."""
    thinking, effort = think_level(think, engine.release)
    rendered = render(messages, thinking=thinking, effort=effort, release=engine.release, tools=tools)
    ids = Spoken(engine.tokenizer, session.ids).encode(rendered)
    return Prompt(ids, marks_of(ids, engine.tokenizer, drops_reasoning=thinking and not tools), thinking, effort)


def marks_of(ids: Sequence[int], tokenizer: Tokenizer, *, drops_reasoning: bool) -> tuple[int, ...]:
    """Where prompts part: after a long system text, and at a header whose `<think>` will read `</think>` next time."""
    user = tokenizer.control(texts.USER)
    first = next((place for place, token in enumerate(ids) if token == user), 0)
    system = (first,) if first >= SHARED_PROMPT else ()
    header = (len(ids) - 1,) if drops_reasoning and len(ids) > 1 else ()
    return system + header


def default_max_tokens(prompt: Prompt) -> int:
    """DeepSeek's own limits by mode; the end of the context may come first."""
    if not prompt.thinking:
        return 8192
    return 131_072 if prompt.effort == "max" else 65_536


def unsayable(engine: Loaded) -> list[int]:
    """Ids that no answer contains: placeholders, images, task tokens, and the padding behind the vocabulary."""
    known = engine.tokenizer
    sayable = {known.control(spelling) for spelling in SAYABLE}
    return [*sorted(known.control_ids - sayable), *range(known.vocab_size, engine.config.vocab_size)]


class Spoken:
    """How the model spelled what the timeline holds: for each stretch of its words between control tokens, the ids.

    A stretch is found by its text, and also by its text without the newlines around it, which the parser does not show.
    The stretch that is still open (an answer that was cut off) matches every text that begins with it.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._speech = {tokenizer.control(spelling) for spelling in SPEECH}
        self._stretches: dict[str, list[int]] = {}
        stretch: list[int] | None = None
        for token in ids:
            if token in tokenizer.control_ids:
                self._keep(stretch)
                stretch = [] if token in self._speech else None
            elif stretch is not None:
                stretch.append(token)
        self._open = stretch or []
        self._opening = tokenizer.decode(self._open).lstrip("\n")

    def encode(self, rendered: Rendered) -> list[int]:
        ids: list[int] = []
        for segment in rendered:
            if isinstance(segment, Control):
                ids.append(self._tokenizer.control(segment.text))
            elif ids and ids[-1] in self._speech:
                ids += self._respell(segment)
            else:
                ids += self._tokenizer.encode_text(segment.text)
        return ids

    def _keep(self, stretch: list[int] | None) -> None:
        if stretch:
            text = self._tokenizer.decode(stretch)
            for seen in (text, text.lstrip("\n"), text.strip("\n")):
                self._stretches.setdefault(seen, stretch)

    def _respell(self, segment: Text) -> list[int]:
        if segment.text in self._stretches:
            return self._stretches[segment.text]
        if self._opening and segment.text.startswith(self._opening):
            return self._open + self._tokenizer.encode_text(segment.text[len(self._opening):])
        return self._tokenizer.encode_text(segment.text)
