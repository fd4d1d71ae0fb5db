"""How the next token is chosen, as plain numbers: the one place where the defaults and ranges are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4cli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """The settings of a sampler; the defaults are the ones the model's authors publish (temperature 1, all mass kept).

    temperature         0 picks the likeliest token always (greedy); 1 samples the model's own distribution
    top_p               keep the likeliest tokens that together reach this probability (1: all)
    min_p               keep tokens at least this fraction as likely as the likeliest (0: all)
    top_k               keep this many of the likeliest tokens (0: all)
    repetition_penalty  divide positive logits of tokens already seen by this, multiply negative ones (1: off)
    seed                the same seed gives the same choices; None draws a fresh one

    Raises UsageError naming the value and its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _demand("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 (greedy) and 100")
        _demand("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (all)")
        _demand("min_p", self.min_p, 0 <= self.min_p < 1, "at least 0 (all) and below 1")
        _demand("top_k", self.top_k, self.top_k >= 0 and self.top_k % 1 == 0, "a whole number, 0 (all) or more")
        _demand("repetition_penalty", self.repetition_penalty, 0.1 <= self.repetition_penalty <= 10,
                "from 0.1 to 10 (1 is off)")
        if self.seed is not None:
            _demand("seed", self.seed, 0 <= self.seed < 1 << 63, "a whole number from 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Below 1e-5 a division by the temperature could leave float32's range, and only the maximum is likely."""
        return self.temperature < 1e-5


def _demand(name: str, value: float, allowed: bool, wanted: str) -> None:
    if not (math.isfinite(value) and allowed):
        raise UsageError(f"{name} is {value}, but it must be {wanted}.", f"Choose another value for {name}.")
