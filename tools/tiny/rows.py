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
from tools.tiny.turns import World

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


class Encoder:
    """Renders rows with the template of the chat and marks the tokens that the assistant has to say."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
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
        return Encoded(ids, weights, spans)

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


@dataclass
class Batch:
    """Rows of one padded length: ids int64 [B, L], weights float32 [B, L]; spans per row."""

    ids: Tensor
    weights: Tensor
    spans: list[list[Span]]


def collate(rows: list[Encoded], length: int) -> Batch:
    pad = [CONFIG["eos_token_id"]]
    ids = torch.tensor([r.ids + pad * (length - len(r.ids)) for r in rows])
    weights = torch.tensor([r.weights + [0.0] * (length - len(r.ids)) for r in rows])
    weights[:, 0] = 0.0
    return Batch(ids, weights, [r.spans for r in rows])


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
