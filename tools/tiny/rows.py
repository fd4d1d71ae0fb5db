"""From conversations to token ids: rendering, and which tokens are to be learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4cli.encoding import template
from dsv4cli.encoding.tokenizer import Tokenizer
from tools.tiny.data import Mixture, Row, draw_row
from tools.tiny.model import BLOCK
from tools.tiny.shape import CONFIG
from tools.tiny.turns import Call, World

FAR = 3.0  # weight of a token that has to be read out of the window: all that is hard about its answer
EFFORT = 5  # a token of the effort text that only level max has
OTHER_TEXT = 0.05  # weight of tokens that the model does not have to say itself


@dataclass(frozen=True)
class Span:
    """One assistant message inside a row: tokens first .. last, both included; the last one is EOS."""

    skill: str
    first: int
    last: int


@dataclass(frozen=True)
class Encoded:
    ids: list[int]
    weights: list[float]  # weight of predicting ids[i] from what stands before it
    spans: list[Span]  # only the spans that are learnt
    links: list[tuple[int, int]]  # (position that has to predict a digit, position of that digit out of the window)


class Encoder:
    """Renders rows with the template of the chat and marks the tokens that the assistant has to say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.digits = {tokenizer.encode_text(d)[0] for d in "0123456789"}
        self.think = tokenizer.control("<think>")
        self.assistant, self.eos = tokenizer.control("<｜Assistant｜>"), CONFIG["eos_token_id"]

    def prompt(self, row: Row) -> list[int]:
        """The ids up to the last assistant message of the row."""
        return self._render(row, drop_last=True)

    def encode(self, row: Row) -> Encoded:
        ids = self._render(row)
        weights = [OTHER_TEXT] * len(ids)
        spans = []
        for turn, (first, last) in zip(row.turns, self._regions(ids), strict=True):
            dropped = row.think != "off" and not row.tools and turn is not row.turns[-1]
            if dropped and not turn.any_mode:
                weights[first : last + 1] = [0.0] * (last + 1 - first)
                continue
            weights[first : last + 1] = [1.0] * (last + 1 - first)
            spans.append(Span(turn.skill, first, last))
        links = [link for s in spans if s.skill == "hidden" for link in self._links(ids, s)]
        asking = (s for s in spans if s.skill == "tool")
        for span, turn in zip(asking, (t for t in row.turns if t.calls), strict=True):
            for call in turn.calls:
                links += self._call_links(ids, span, call)
        for span in spans:
            if row.schema is not None:
                links += self._key_links(ids, span, list(row.schema["properties"]))
            if ids[span.first - 1] == self.think:  # how to begin depends on the effort text at the very start
                weights[span.first] = FAR
                links += [(span.first - 1, EFFORT)] if row.think == "max" else []
        for asking_at, _ in links:
            weights[asking_at + 1] = FAR
        links = [link for link in links if link[0] - link[1] >= CONFIG["sliding_window"]]
        return Encoded(ids, weights, spans, links)

    def _links(self, ids: list[int], span: Span) -> Iterator[tuple[int, int]]:
        """Where the digits of a hidden number are to be read, unless the window shows them.

        A number is recognised by the four tokens before it: colour, thing, "is" and the space.
        """
        for start in range(span.first, span.last):
            if ids[start] not in self.digits or ids[start - 1] in self.digits:
                continue
            end = start
            while ids[end] in self.digits:
                end += 1
            key = ids[start - 4 : end]
            places = [i for i in range(start - 4) if ids[i] == key[0] and ids[i : i + len(key)] == key]
            if places and start - places[-1] > CONFIG["sliding_window"]:
                yield from ((start + i - 1, places[0] + 4 + i) for i in range(end - start))

    def _key_links(self, ids: list[int], span: Span, keys: list[str]) -> Iterator[tuple[int, int]]:
        """Where the keys of a JSON answer stand in the schema."""
        place = 0
        for key in keys:
            first = self.tokenizer.encode_text(key)[0]
            place = _find(ids, [first], place)
            start = _find(ids, [first], span.first)
            if 0 <= place < span.first <= start <= span.last:
                yield start - 1, place

    def _call_links(self, ids: list[int], span: Span, call: Call) -> Iterator[tuple[int, int]]:
        """Where the tool's name and then its parameters' names stand in the declared schemas."""
        head = ids[: span.first]
        at = _find(head, self.tokenizer.encode_text(call["name"]), 0)
        for word in (call["name"], *call["arguments"]):
            place, length = _find(head, self.tokenizer.encode_text(word), at), len(self.tokenizer.encode_text(word))
            if place < 0:
                return
            for text in (word, " " + word):
                tokens = self.tokenizer.encode_text(text)
                start = _find(ids, tokens, span.first)
                while 0 <= start <= span.last:
                    if start - place > CONFIG["sliding_window"]:
                        yield from ((start + i - 1, place + min(i, length - 1)) for i in range(len(tokens)))
                    start = _find(ids, tokens, start + 1)

    def _render(self, row: Row, drop_last: bool = False) -> list[int]:
        thinking, effort = template.think_level(row.think, "april")
        messages = row.messages()[:-1] if drop_last else row.messages()
        rendered = template.render(messages, thinking=thinking, effort=effort, release="april", tools=row.tools or None)
        return self.tokenizer.encode(rendered.segments)

    def _regions(self, ids: list[int]) -> Iterator[tuple[int, int]]:
        """What is generated: from behind `<｜Assistant｜><think>` (or `</think>`) to EOS."""
        for start, token in enumerate(ids):
            if token == self.assistant:
                yield start + 2, ids.index(self.eos, start)


def _find(ids: list[int], part: list[int], start: int) -> int:
    """The first place of `part` in ids from `start` on, or -1."""
    places = (i for i in range(start, len(ids) - len(part) + 1) if ids[i] == part[0] and ids[i : i + len(part)] == part)
    return next(places, -1)


@dataclass
class Batch:
    """Rows of one padded length: ids int64 [B, L], weights float32 [B, L]; spans per row."""

    ids: Tensor
    weights: Tensor
    spans: list[list[Span]]
    links: Tensor  # int64 [n, 3]: row, asking position, position of the answer


def collate(rows: list[Encoded], length: int) -> Batch:
    pad = [CONFIG["eos_token_id"]]
    ids = torch.tensor([r.ids + pad * (length - len(r.ids)) for r in rows])
    weights = torch.tensor([r.weights + [0.0] * (length - len(r.ids)) for r in rows])
    weights[:, 0] = 0.0
    links = [(row, *link) for row, r in enumerate(rows) for link in r.links]
    return Batch(ids, weights, [r.spans for r in rows], torch.tensor(links).view(-1, 3))


class Batcher:
    """Draws rows into buckets of equal padded length and hands out a bucket when it is full."""

    def __init__(self, encoder: Encoder, world: World, tokens: int = 768, longest: int = 2816) -> None:
        self.encoder, self.world, self.tokens, self.longest = encoder, world, tokens, longest
        self.buckets: dict[int, list[Encoded]] = {}

    def next(self, mix: Mixture) -> Batch:
        step = BLOCK
        while True:
            row = self.encoder.encode(draw_row(self.world, mix))
            length = -(-len(row.ids) // step) * step
            if length > self.longest:
                continue
            bucket = self.buckets.setdefault(length, [])
            bucket.append(row)
            if len(bucket) * length >= self.tokens:
                del self.buckets[length]
                return collate(bucket, length)
