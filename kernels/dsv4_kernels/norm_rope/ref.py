"""RMS norm, YaRN frequencies and the rotation of adjacent pairs, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.norm_rope import Entry, Placed, Yarn


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def frequencies(dims: int, theta: float, yarn: Yarn | None) -> Tensor:
    freqs = 1 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    if yarn is None:
        return freqs

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes so many full turns within the trained context."""
        return dims * math.log(yarn.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dims - 1)
    ramp = ((torch.arange(dims // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs / yarn.factor * ramp + freqs * (1 - ramp)


def turns(positions: Tensor, freqs: Tensor) -> Tensor:
    angles = positions.to(torch.float32).unsqueeze(-1) * freqs
    return torch.complex(angles.cos(), angles.sin())


def place_token(at: Tensor, window_freqs: Tensor, compress_freqs: Tensor, window: int, ratios: Sequence[int]) -> Placed:
    entries = (Entry((at + 1) // ratio, at // ratio, turns(at // ratio * ratio, compress_freqs)) for ratio in ratios)
    return Placed(turns(at, window_freqs), turns(at, compress_freqs), at % window, tuple(entries))


def rotate(x: Tensor, turns: Tensor, inverse: bool) -> Tensor:
    pairs = turns.shape[-1]
    out = alloc.empty_like(x)
    out[..., :-2 * pairs] = x[..., :-2 * pairs]
    tail = x[..., -2 * pairs:].unflatten(-1, (pairs, 2)).clone(memory_format=torch.contiguous_format)
    turns = turns.reshape(len(turns), *[1] * (x.dim() - 2), pairs)
    turned = torch.view_as_real(torch.view_as_complex(tail) * (turns.conj() if inverse else turns))
    out[..., -2 * pairs:] = turned.flatten(-2)
    return out


def norm_rotate(x: Tensor, weight: Tensor | None, eps: float, turns: Tensor) -> Tensor:
    return rotate(rms_norm(x, weight, eps), turns, False)
