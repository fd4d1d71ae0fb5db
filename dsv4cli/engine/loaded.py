"""What an opened model consists of: everything that sessions, turns and measurements need to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dsv4_quant.config import ModelConfig
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.engine.hot import Hot
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.engine.rates import Foretold
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import UsageError
from dsv4cli.model.transformer import Model


@dataclass(frozen=True)
class Loaded:
    """A model in memory with its tokenizer and its memory plan. Immutable; the Engine is the door to it."""

    name: str
    model: Model
    tokenizer: Tokenizer
    release: str  # "april" or "0731": which chat format the weights were trained on
    plan: MemoryPlan
    fingerprint: str  # of configuration, weights and numerics: what a saved session must match
    sampling: Sampling = field(default_factory=Sampling)  # what the model's authors recommend, where a request says nothing
    device_reason: str = "it was asked for"  # why the model is on its device
    hot: Hot | None = None  # what to keep on a card, where not all experts fit there
    foretold: Foretold = field(default_factory=Foretold.nothing)  # how fast it will decode here

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def numerics(self) -> str:
        return self.model.numerics.name

    @property
    def device(self) -> str:
        """The type of the device that the model computes on: "cpu" or "cuda"."""
        return self.model.device.type

    @property
    def ctx(self) -> int:
        """The context in tokens: prompt and answer together."""
        return self.plan.context

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights as held."""
        return self.model.weight_bytes

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
