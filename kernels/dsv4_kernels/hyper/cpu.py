"""Hyper-connections in C++. Tensors other than float32 go the way of `ref`."""

from __future__ import annotations

from torch import Tensor, float32

from dsv4_kernels import alloc
from dsv4_kernels.hyper import HyperSettings, Mixer, ref
from dsv4_kernels.native.library import F, I, P, load, signature
from dsv4_kernels.native.queue import by_torch, dense

signature("dsv4_mix_streams", P, I, I, I, P, P, P, F, F, I, P, P, P, P)
signature("dsv4_spread_streams", P, P, P, P, I, I, I, P)
signature("dsv4_merge_streams", P, I, I, I, P, P, P, F, F, P)


def mix_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, norm: Tensor | None = None,
                sums: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if not _fits(streams, *mixer) or (norm is not None and norm.dtype != float32):
        return by_torch(ref.mix_streams, streams, mixer, settings, norm)
    t, s, d = streams.shape
    streams, (fn, base, scale) = dense(streams), _contiguous(mixer)
    weight = None if norm is None else dense(norm).data_ptr()
    x, post, across = alloc.empty((t, d), float32), alloc.empty((t, s), float32), alloc.empty((t, s, s), float32)
    load().dsv4_mix_streams(streams.data_ptr(), t, s, d, fn.data_ptr(), base.data_ptr(), scale.data_ptr(), *settings,
                            weight, x.data_ptr(), post.data_ptr(), across.data_ptr())
    return x, post, across


def spread_streams(out: Tensor, streams: Tensor, post: Tensor, across: Tensor) -> Tensor:
    if not _fits(out, streams, post, across):
        return by_torch(ref.spread_streams, out, streams, post, across)
    t, s, d = streams.shape
    out, streams, post, across = dense(out), dense(streams), dense(post), dense(across)
    spread = alloc.empty((t, s, d), float32)
    load().dsv4_spread_streams(out.data_ptr(), streams.data_ptr(), post.data_ptr(), across.data_ptr(), t, s, d,
                               spread.data_ptr())
    return spread


def merge_streams(streams: Tensor, mixer: Mixer, settings: HyperSettings, sums: Tensor | None = None) -> Tensor:
    if not _fits(streams, *mixer):
        return by_torch(ref.merge_streams, streams, mixer, settings)
    t, s, d = streams.shape
    streams, (fn, base, scale) = dense(streams), _contiguous(mixer)
    merged = alloc.empty((t, d), float32)
    load().dsv4_merge_streams(streams.data_ptr(), t, s, d, fn.data_ptr(), base.data_ptr(), scale.data_ptr(),
                              settings.norm_eps, settings.eps, merged.data_ptr())
    return merged


def _fits(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> bool:
    return first.dtype == second.dtype == third.dtype == fourth.dtype == float32


def _contiguous(mixer: Mixer) -> tuple[Tensor, Tensor, Tensor]:
    return dense(mixer.fn), dense(mixer.base), dense(mixer.scale)
