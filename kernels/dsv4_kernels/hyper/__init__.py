"""Manifold-constrained hyper-connections: several residual streams, mixed by the token itself (spec section 3.6)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsv4_kernels.backends import pick
from dsv4_kernels.checks import demand_shape


class Mixer(NamedTuple):
    """Weights of one hyper-connection, float32, for s streams of d values; m = (2 + s) * s, at the model's head s."""

    fn: Tensor     # [m, s * d]
    base: Tensor   # [m]
    scale: Tensor  # [3]: of the ways in, out and across; [1] at the head


class HyperSettings(NamedTuple):
    """Constants of the configuration: eps of the norm over the streams, eps of the mixture, Sinkhorn rounds."""

    norm_eps: float
    eps: float
    rounds: int


def mix_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, norm: Tensor | None = None,
                sums: Tensor | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input, and how its output goes back.

    streams [t, s, d] -> x [t, d], with norm [d] already RMS-normed by it (and settings.norm_eps), post [t, s] (share of the
    output that each stream takes), across [t, s, s] (doubly stochastic but for eps; first index the source stream,
    second the destination). sums: what `residual` left behind of these streams for this mixer, else it is computed here.
    """
    _, s, d = _streams(streams)
    demand_shape("hyper fn", mixer.fn, (2 + s) * s, s * d)
    demand_shape("hyper base", mixer.base, (2 + s) * s)
    demand_shape("hyper scale", mixer.scale, 3)
    if norm is not None:
        demand_shape("norm weight", norm, d)
    _demand_sums(sums, streams, mixer)
    return pick("hyper", streams.device.type, backend).module.mix_streams(streams, mixer, settings, norm, sums)


def spread_streams(out: Tensor, streams: Tensor, post: Tensor, across: Tensor, *,
                   backend: str | None = None) -> Tensor:
    """New streams: stream k takes post_k of the sublayer's output plus sum_j across[j, k] of the old ones.

    out [t, d], streams [t, s, d], post [t, s], across [t, s, s] -> [t, s, d].
    """
    t, s, d = _streams(streams)
    demand_shape("sublayer output", out, t, d)
    demand_shape("post", post, t, s)
    demand_shape("across", across, t, s, s)
    return pick("hyper", streams.device.type, backend).module.spread_streams(out, streams, post, across)


def merge_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, sums: Tensor | None = None, *,
                  backend: str | None = None) -> Tensor:
    """The model's head: one weighted sum of the streams. streams [t, s, d], sums as for `mix_streams` -> [t, d]."""
    _, s, d = _streams(streams)
    demand_shape("hyper fn", mixer.fn, s, s * d)
    demand_shape("hyper base", mixer.base, s)
    demand_shape("hyper scale", mixer.scale, 1)
    _demand_sums(sums, streams, mixer)
    return pick("hyper", streams.device.type, backend).module.merge_streams(streams, mixer, settings, sums)


def _streams(streams: Tensor) -> tuple[int, int, int]:
    demand_shape("streams", streams, None, None, None)
    t, s, d = streams.shape
    return t, s, d


def _demand_sums(sums: Tensor | None, streams: Tensor, mixer: Mixer) -> None:
    """Parts of fn times the streams, and of the streams' squares."""
    if sums is not None:
        demand_shape("sums", sums, streams.shape[0], mixer.fn.shape[0] + 1, None)
