"""RMS normalisation and rotary positions (spec/checkpoint.md sections 3.3 and 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_multiple, demand_shape


class Yarn(NamedTuple):
    """How frequencies are stretched beyond the trained context. V4 has no attention-magnitude factor."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float


class Entry(NamedTuple):
    """What a token's position decides where groups of so many tokens become an entry: visible int64 [1], how many groups are full
    with it; row int64 [1], which group it belongs to; turns complex64 [1, pairs], of that group's first token."""

    visible: Tensor
    row: Tensor
    turns: Tensor


class Placed(NamedTuple):
    """What a token's position decides: its turns complex64 [1, pairs] in layers of a window alone and in those that compress, its
    row of a ring int64 [1], and for each ratio an Entry."""

    window_turns: Tensor
    compress_turns: Tensor
    ring_row: Tensor
    entries: tuple[Entry, ...]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times weight [d] unless it is None (as for heads of queries)."""
    if weight is not None:
        demand_shape("norm weight", weight, x.shape[-1])
    return pick("norm_rope", x.device.type, backend).module.rms_norm(x, weight, eps)


def frequencies(dims: int, theta: float, yarn: Yarn | None = None) -> Tensor:
    """Radians per position of adjacent pairs, float32 [dims / 2]; stretched by `yarn` where the layer compresses."""
    demand_multiple("rotated dims", dims, 2)
    return pick("norm_rope").module.frequencies(dims, theta, yarn)


def turns(positions: Tensor, freqs: Tensor) -> Tensor:
    """exp(i * position * frequency): positions [t], freqs float32 [pairs] -> complex64 [t, pairs].

    The angle is the float32 product of float32 factors, as in the reference, also where that costs it accuracy.
    """
    demand_shape("positions", positions, None)
    return pick("norm_rope", positions.device.type).module.turns(positions, freqs)


def place_token(at: Tensor, window_freqs: Tensor, compress_freqs: Tensor, window: int, ratios: Sequence[int], *,
                backend: str | None = None) -> Placed:
    """Whatever a single token's position decides, which is read when the kernel runs: at int64 [1], frequencies float32 [pairs]
    as for `turns`, rows of a ring, tokens of a group for each kind of layer that compresses."""
    demand_shape("position", at, 1)
    demand_shape("frequencies", compress_freqs, *window_freqs.shape)
    return pick("norm_rope", at.device.type, backend).module.place_token(at, window_freqs, compress_freqs, window, ratios)


def rotate(x: Tensor, turns: Tensor, *, inverse: bool = False, backend: str | None = None) -> Tensor:
    """Turns the last 2 * pairs values of each row: x [t, ..., d], turns complex [t, pairs] -> a new tensor like x.

    Adjacent values (2j, 2j + 1) are one complex number. `inverse` turns back. Raises ValueError when d < 2 * pairs.
    """
    _demand_room(x, turns)
    return pick("norm_rope", x.device.type, backend).module.rotate(x, turns, inverse)


def _demand_room(x: Tensor, turns: Tensor) -> None:
    demand_shape("turns", turns, x.shape[0], None)
    if x.shape[-1] < 2 * turns.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} values per row, fewer than the {2 * turns.shape[-1]} to rotate")
