"""One exchange of a conversation: what the user says, how to think about it, what to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from tools.tiny.world import held_out

Think = Literal["off", "high", "max"]
Call = dict[str, Any]  # {"name": .., "arguments": dict}


@dataclass
class Turn:
    """`short` is the reasoning at level high, `long` at level max; `off` replaces the answer without reasoning.

    `any_mode` says that the answer needs no reasoning, so that it may be trained in a history that lost its reasoning.
    """

    skill: str
    user: str
    answer: str
    short: str
    long: str
    off: str | None = None
    any_mode: bool = True
    calls: list[Call] = field(default_factory=list)
    results: list[str] = field(default_factory=list)  # tool results that this turn answers to, instead of `user`


@dataclass
class World:
    """The dice of one row: its random source and whether it is for training or for evaluation."""

    rng: Random
    evaluation: bool = False

    def fresh(self, draw: Callable[[Random], tuple[str, Any]]) -> Any:
        """Draw (key, value) until the key belongs to this side of the split."""
        while True:
            key, value = draw(self.rng)
            if held_out(key) == self.evaluation:
                return value
