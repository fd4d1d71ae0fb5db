"""From logits to a token id, where the logits are: penalty, temperature, top-k, top-p, min-p, then one draw.

Chances are whole numbers, 2^40 for the likeliest token, so that sums are exact in any order, and every device draws the same
token from the same logits and the same number.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape

UNIT = 40  # bits of the likeliest token's chance; what is 2^-41 as likely, or less, is never drawn
SEEN, BANNED = 1, 2  # marks of a token


class Filters(NamedTuple):
    """What is drawn from, as in the engine's Sampling. All are rounded to float32."""

    temperature: float = 1.0  # 0: the likeliest, of equals the first
    top_k: int = 0            # this many of the likeliest, of equals the first; 0: all
    top_p: float = 1.0        # the likeliest until they reach this share of what top_k left
    min_p: float = 0.0        # at least this fraction as likely as the likeliest
    penalty: float = 1.0      # of tokens that were seen: positive logits are divided by it, others multiplied


def sample(logits: Tensor, marks: Tensor, filters: Filters, draw: int = 0, *, backend: str | None = None) -> Tensor:
    """The id int64 [1] of a token, on the logits' device; -1 if a logit is no number, or none that may be chosen is finite.

    logits float32 [vocab], marks uint8 [vocab] (0, SEEN, BANNED or both), draw: a whole number below 2^53, evenly drawn. Of the
    tokens that are left, in the order of their ids, the first that takes the sum of chances above draw / 2^53 of them all.
    Raises ValueError for shapes that differ.
    """
    demand_shape("logits", logits, None)
    demand_shape("marks", marks, *logits.shape)
    if not 0 <= draw < 1 << 53:
        raise ValueError(f"the number drawn is {draw}, but it must be below 2^53")
    return pick("sampling", logits.device.type, backend).module.sample(logits, marks, filters, draw)
