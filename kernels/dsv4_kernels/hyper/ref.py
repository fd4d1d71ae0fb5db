"""Hyper-connections in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_kernels.hyper import HyperSettings, Mixer
from dsv4_kernels.norm_rope.ref import rms_norm


def mix_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, norm: Tensor | None = None,
                sums: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    s = streams.shape[1]
    sizes = (s, s, s * s)  # the ways in, out and across
    mixes = zip(_mixes(streams, mixer, settings).split(sizes, -1), mixer.scale, mixer.base.split(sizes), strict=True)
    to_sublayer, to_streams, across = (base + scale * mix for mix, scale, base in mixes)
    pre = to_sublayer.sigmoid() + settings.eps
    post = 2 * to_streams.sigmoid()
    x = _weighted(pre, streams)
    if norm is not None:
        x = rms_norm(x, norm, settings.norm_eps)
    return x, post, sinkhorn(across.unflatten(-1, (s, s)), settings)


def spread_streams(out: Tensor, streams: Tensor, post: Tensor, across: Tensor) -> Tensor:
    return torch.baddbmm(post.unsqueeze(2) * out.unsqueeze(1), across.transpose(1, 2), streams)


def merge_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, sums: Tensor | None = None) -> Tensor:
    mixes = _mixes(streams, mixer, settings) * mixer.scale + mixer.base
    return _weighted(mixes.sigmoid() + settings.eps, streams)


def sinkhorn(logits: Tensor, settings: HyperSettings) -> Tensor:
    """logits [t, s, s] -> almost doubly stochastic: softmax of rows, then columns and rows in turn, columns last.

    Every division is by a number per row or per column, so only their products are kept: the matrix is
    `start / (rows * columns)` throughout. Dividing rows by (their sum + eps) then means rows' = start / columns + eps * rows,
    one product where the matrix itself would take a sum, an addition and a division.
    """
    start = logits.softmax(-1).add_(settings.eps)
    turned = start.transpose(1, 2)
    rows = torch.ones_like(start[..., :1])
    columns = torch.baddbmm(rows, turned, rows, beta=settings.eps)
    for _ in range(settings.rounds - 1):
        rows = torch.baddbmm(rows, start, columns.reciprocal(), beta=settings.eps)
        columns = torch.baddbmm(columns, turned, rows.reciprocal(), beta=settings.eps)
    return start / rows / columns.transpose(1, 2)


def _mixes(streams: Tensor, mixer: Mixer, settings: HyperSettings) -> Tensor:
    """fn times the root-mean-square-normed streams; the norm is one factor per token, so it is applied afterwards."""
    flat = streams.flatten(1)
    return functional.linear(flat, mixer.fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + settings.norm_eps)


def _weighted(shares: Tensor, streams: Tensor) -> Tensor:
    return torch.bmm(shares.unsqueeze(1), streams).squeeze(1)
