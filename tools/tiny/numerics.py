"""The small differentiable pieces of the architecture, in plain numerics (spec/checkpoint.md sections 3.3 to 3.6)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., in] times weight [out, in], computed in the dtype of the weight (bfloat16 in training)."""
    return F.linear(x.to(weight.dtype), weight)


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis in float32; no weight means the weightless norm of the query heads."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)


def rope_frequencies(config: dict[str, Any], compressed: bool) -> Tensor:
    """Angles per position, float32 [rope_dim / 2]; YaRN only in layers with a compress ratio (section 3.4)."""
    dim = config["qk_rope_head_dim"]
    theta = config["compress_rope_theta"] if compressed else config["rope_theta"]
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if not compressed:
        return freq.float()
    s = config["rope_scaling"]

    def turn(rotations: float) -> float:
        length = s["original_max_position_embeddings"]
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = max(math.floor(turn(s["beta_fast"])), 0), min(math.ceil(turn(s["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return (freq / s["factor"] * ramp + freq * (1 - ramp)).float()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the last 2 * turns.shape[-1] elements of x in adjacent pairs.

    turns is complex64 and broadcasts over x[.., pairs]; its conjugate undoes the rotation.
    """
    width = 2 * turns.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].float().unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turns).flatten(-2)
    return turned if x.shape[-1] == width else torch.cat([x[..., :-width].float(), turned], -1)


def sinkhorn(scores: Tensor, iters: int, eps: float) -> Tensor:
    """Doubly stochastic matrices from scores [source, destination, tokens]; the last step normalises columns."""
    c = scores.softmax(1) + eps
    c = c / (c.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(1, keepdim=True) + eps)
        c = c / (c.sum(0, keepdim=True) + eps)
    return c


class MixScores(torch.autograd.Function):
    """Scores of the hyper-connection [mix, T] = fn . x * rsqrt(mean(x^2) + eps); x [T, hc * D], fn [mix, hc * D].

    By hand because the gradient through the norm then costs one pass over x instead of six.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fn: Tensor, eps: float) -> Tensor:
        raw = F.linear(x, fn)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        ctx.save_for_backward(x, fn, raw, scale)
        return (raw * scale).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, fn, raw, scale = ctx.saved_tensors
        scaled = grad.t() * scale
        grad_x = scaled @ fn
        grad_x.addcmul_(x, (scaled * raw).sum(-1, keepdim=True) * scale.square() / -x.shape[-1])
        return grad_x, scaled.t() @ x, None


def mix_scores(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Scores of the hyper-connection, [mix, tokens], from the streams h [tokens, hc, D]."""
    scores: Tensor = MixScores.apply(h.flatten(1), fn, eps)
    return scores


def collapse(h: Tensor, pre: Tensor) -> Tensor:
    """Weighted sum of the streams: h [tokens, hc, D], pre [hc, tokens] -> [tokens, D]."""
    return torch.bmm(pre.t()[:, None], h)[:, 0]


class Spread(torch.autograd.Function):
    """h'_k = post_k * out + sum_j comb[j, k] * h_j, written as 20 fused passes (a batched 4x4 product is slower).

    h [T, hc, D], out [T, D], post [hc, T], comb [hc, hc, T] (source first), all float32.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        ctx.save_for_backward(h, out, post, comb)
        result = torch.empty_like(h)
        for k in range(h.shape[1]):
            torch.mul(out, post[k, :, None], out=result[:, k])
            for j in range(h.shape[1]):
                result[:, k].addcmul_(h[:, j], comb[j, k, :, None])
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        h, out, post, comb = ctx.saved_tensors
        grad = grad.contiguous()
        grad_h, grad_out = torch.zeros_like(h), torch.zeros_like(out)
        for k in range(h.shape[1]):
            grad_out.addcmul_(grad[:, k], post[k, :, None])
            for j in range(h.shape[1]):
                grad_h[:, j].addcmul_(grad[:, k], comb[j, k, :, None])
        grad_post = torch.bmm(grad, out[:, :, None])[..., 0].t()
        grad_comb = torch.bmm(h, grad.transpose(1, 2)).permute(1, 2, 0)
        return grad_h, grad_out, grad_post, grad_comb
