"""The Engine: a loaded model with its tokenizer and its memory plan. Nothing in it changes after opening."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dsv4_quant.config import ModelConfig
from dsv4_quant.files import open_source
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.engine import opening, turn
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.engine.records import Token
from dsv4cli.engine.release import release_of
from dsv4cli.engine.sampling import Sampling
from dsv4cli.engine.session import Progress, Session
from dsv4cli.engine.stream import Cancel
from dsv4cli.errors import UsageError
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.transformer import Model
from dsv4cli.registry import catalog


@dataclass(frozen=True)
class Engine:
    """A loaded model. `session()` begins a timeline over it, `chat()` answers a conversation."""

    name: str
    model: Model
    tokenizer: Tokenizer
    release: str  # "april" or "0731": which chat format the weights were trained on
    plan: MemoryPlan
    fingerprint: str  # of configuration, weights and numerics: what a saved session must match
    sampling: Sampling = field(default_factory=Sampling)  # what the model's authors recommend, where a request says nothing

    @classmethod
    def open(cls, model: str | Path = "tiny", *, numerics: str = "official", device: str = "auto",
             threads: int | None = None, ctx: int | None = None, release: str | None = None) -> Engine:
        """Opens a model by alias, checkpoint folder or .gguf path.

        ctx None chooses the longest usual context that fits; threads None leaves torch's own choice. Raises UsageError
        (unknown name, bad value), CapacityError with both numbers before anything is loaded that does not fit, and
        what the reader raises for a damaged or unknown file.
        """
        numerics_named(numerics)
        _demand_cpu(device)
        _use_threads(threads)
        entry = catalog.resolve(str(model))
        source = open_source(entry.located())
        plan = opening.plan_of(source, entry.name, ctx, numerics)
        return cls(entry.name, Model.bind(source, numerics=numerics), opening.tokenizer_of(source, entry.name),
                   release_of(entry, source.metadata, release), plan, opening.fingerprint_of(source, numerics),
                   opening.sampling_of(source))

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def numerics(self) -> str:
        return self.model.numerics.name

    @property
    def ctx(self) -> int:
        """The context in tokens: prompt and answer together."""
        return self.plan.context

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights as held."""
        return self.model.weight_bytes

    def session(self) -> Session:
        """A new, empty timeline."""
        return Session(self)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, think: str = "high",
             tools: Sequence[dict[str, Any]] | None = None, sampling: Sampling | None = None,
             max_tokens: int | None = None, stop: Sequence[str] = (), think_budget: int | None = None,
             session: Session | None = None, cancel: Cancel | None = None,
             progress: Progress | None = None) -> Iterator[Token]:
        """Answers a conversation in OpenAI's message shape; yields one record per token, the last one with `finish`.

        think: off, low, high or max (or an alias of the API); tools: OpenAI's tool objects; sampling: None for what the
        model's authors recommend; stop: strings that end the answer. With a session, whatever the conversation shares
        with the session's timeline is not computed again. The other arguments are those of `stream.generate`. A bad
        request raises here, before the first record.
        """
        return turn.answer(self, [dict(message) for message in messages], session=session or self.session(),
                           think=think, tools=tools, sampling=sampling or self.sampling, max_tokens=max_tokens, stop=stop,
                           think_budget=think_budget, cancel=cancel, progress=progress)

    def check_ids(self, ids: Sequence[int], after: int = 0) -> None:
        """Raises UsageError unless there are ids, all are in the vocabulary, and they fit behind `after` others."""
        if not ids:
            raise UsageError("The prompt is empty.", "Give at least one token.")
        if after + len(ids) > self.ctx:
            raise UsageError(f"{after + len(ids)} tokens do not fit into the context of {self.ctx}.",
                             "Open the model with a larger --ctx, shorten the prompt, or /clear the conversation.")
        size = self.config.vocab_size
        stranger = next((token for token in ids if not 0 <= token < size), None)
        if stranger is not None:
            raise UsageError(f"Token id {stranger} is outside the vocabulary of {size}.",
                             f"Ids go from 0 to {size - 1}.")


def _demand_cpu(device: str) -> None:
    if device == "cuda":
        raise UsageError("There are no GPU kernels yet, so nothing can run on cuda.",
                         "Leave --device out, or use --device cpu.")
    if device not in ("auto", "cpu"):
        raise UsageError(f"There is no device {device!r}.", "Choose auto, cpu or cuda.")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads cannot compute anything.", "Choose --threads 1 or more.")
        torch.set_num_threads(threads)
