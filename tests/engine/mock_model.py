"""An engine without weights: a real tokenizer over bytes, and two models whose every logit is known.

`Recurrent` mixes each token into a small vector, so its logits depend on every token before: a session that goes back
to a wrong place is caught. `Scripted` says what the test wrote down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4cli.encoding.texts import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from dsv4cli.encoding.tokenizer import ALPHABET, Tokenizer
from dsv4cli.engine.engine import Engine
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.model.recording import Recording
from dsv4cli.model.state import Snapshot

PLACEHOLDER = "<｜place▁holder▁no▁0｜>"
CONTROLS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML, PLACEHOLDER)
VOCABULARY = 256 + len(CONTROLS)


def byte_tokenizer_json() -> dict[str, Any]:
    """A tokenizer.json with one token per byte, then the control tokens."""
    added = [{"id": 256 + place, "content": spelling, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for place, spelling in enumerate(CONTROLS)]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": split, "post_processor": None,
        "decoder": split, "model": {"type": "BPE", "vocab": dict(ALPHABET), "merges": []}}


@dataclass(frozen=True)
class Config:
    vocab_size: int = VOCABULARY
    bos_token_id: int = 256


@dataclass(frozen=True)
class Numerics:
    name: str = "plain"


class MockState:
    """Like the model's State: a position, and a content that a snapshot copies."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.position = 0
        self.recording: Recording | None = None
        self.vector = torch.zeros(8, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes

    def snapshot(self) -> Snapshot:
        return Snapshot(self.position, {"vector": self.vector.clone()})

    def restore(self, snapshot: Snapshot) -> None:
        self.position = snapshot.position
        self.vector = snapshot.contents["vector"].clone()


class Recurrent:
    """vector <- tanh(A vector + embedding of the token); logits = W vector. Bitwise the same however it is cut."""

    config = Config()
    numerics = Numerics()
    weight_bytes = 1000

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.mix, self.embed, self.head = (torch.randn(*shape, generator=random, dtype=torch.float64)
                                           for shape in ((8, 8), (VOCABULARY, 8), (VOCABULARY, 8)))
        self.computed: list[int] = []  # the sizes of all forward calls
        self.fail_at: int | None = None  # position at which a pass is interrupted in the middle

    def new_state(self, max_tokens: int) -> MockState:
        return MockState(max_tokens)

    def forward(self, ids: Tensor, state: MockState, *, logits: str = "last") -> Tensor:
        assert ids.dtype == torch.int64
        assert state.position + len(ids) <= state.max_tokens
        self.computed.append(len(ids))
        rows = []
        for token in ids.tolist():
            state.vector = torch.tanh(self.mix @ state.vector + self.embed[token])
            if state.position == self.fail_at:
                self.fail_at = None
                raise KeyboardInterrupt
            state.position += 1
            rows.append(self.row(state))
        return torch.stack(rows if logits == "all" else rows[-1:])

    def row(self, state: MockState) -> Tensor:
        return (self.head @ state.vector).float()


class Scripted(Recurrent):
    """After `position` tokens the next one is script[position], EOS where nothing is written."""

    def __init__(self) -> None:
        super().__init__()
        self.script: dict[int, int] = {}

    def row(self, state: MockState) -> Tensor:
        row = torch.zeros(VOCABULARY)
        row[self.script.get(state.position, 257)] = 50.0
        return row


def engine_of(model: Recurrent, *, ctx: int = 4096, fingerprint: str = "f", shelf_bytes: int = 1 << 30) -> Engine:
    plan = MemoryPlan(ctx, program=0, vocabulary=0, weights=1000, expanded=0, state=64, snapshots=shelf_bytes, scratch=0,
                      available=None)
    anything: Any = model  # the mock has the three methods that the engine uses
    return Engine("mock", anything, Tokenizer.from_dict(byte_tokenizer_json()), "april", plan, fingerprint)
