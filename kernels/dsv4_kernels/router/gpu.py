"""Routers in Triton: the gate's product is `linear`'s, and then a program owns a token and all its scores.

Of equal scores the expert of lower number is chosen, greatest first. Tensors that are not float32 (table and ids: int64) go the
way of `ref`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32, int64

from dsv4_kernels import alloc
from dsv4_kernels.ahead import Case
from dsv4_kernels.backends import pick
from dsv4_kernels.gpu import Block, Pointer, dense, in_order, padded, warps
from dsv4_kernels.linear import Weight
from dsv4_kernels.router import ref


def route_learned(x: Tensor, gate: Weight, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    if x.dtype != float32 or bias.dtype != float32:
        return ref.route_learned(x, gate, bias, k, scale)
    logits, n = _logits(x, gate), gate.shape[0]
    weights, experts = alloc.empty((len(x), k), float32, x.device), alloc.empty((len(x), k), int64, x.device)
    if len(x):
        _choose[(len(x),)](logits, dense(bias), weights, experts, n, k, scale, N=padded(n), K=padded(k), num_warps=warps(n))
    return weights, experts


def route_by_hash(x: Tensor, gate: Weight, table: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A card cannot raise: for an id that is not in the table, or an expert of the table that is not in the gate, nothing is read
    outside, and the token's weights are no numbers."""
    if x.dtype != float32 or not table.dtype == ids.dtype == int64:
        return ref.route_by_hash(x, gate, table, ids, scale)
    logits, k = _logits(x, gate), table.shape[1]
    weights, experts = alloc.empty((len(x), k), float32, x.device), alloc.empty((len(x), k), int64, x.device)
    if len(x):
        _look_up[(len(x),)](logits, dense(table), dense(ids), weights, experts, gate.shape[0], len(table), k, scale,
                            K=padded(k), num_warps=1)
    return weights, experts


def _logits(x: Tensor, gate: Weight) -> Tensor:
    return dense(pick("linear", x.device.type).module.linear(x, gate))


@triton.jit
def score(logits: Block) -> Block:
    """sqrt(softplus), with the small ones exact: log(1 + u) is repaired by what 1 + u lost of u."""
    power = tl.exp(tl.minimum(logits, 20.0))
    more = 1.0 + power
    lost = tl.where(more == 1.0, 1.0, more - 1.0)
    soft = tl.where(more == 1.0, power, tl.log(more) * (power / lost))
    return tl.sqrt(tl.where(logits <= 20.0, soft, logits))


@triton.jit
def _choose(logits: Pointer, bias: Pointer, weights: Pointer, experts: Pointer, n: int, k: int, scale: float, N: tl.constexpr,
            K: tl.constexpr) -> None:
    token, slot = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    chosen, share = best(logits + token * n, bias, n, k, scale, N, K)
    tl.store(weights + token * k + slot, share, slot < k)
    tl.store(experts + token * k + slot, chosen, slot < k)


@triton.jit
def best(logits: Pointer, bias: Pointer, n: int, k: int, scale: float, N: tl.constexpr, K: tl.constexpr) -> tuple[Block, Block]:
    """A token's experts int64 [K], greatest first, and their weights."""
    expert, slot = tl.arange(0, N), tl.arange(0, K)
    scores = score(tl.load(logits + expert, expert < n, 0.0))
    # One number to compare: the greater score, and of equal scores the lower expert.
    order = in_order(scores + tl.load(bias + expert, expert < n, 0.0)).to(tl.int64)
    order = tl.where(expert < n, order * N + (N - 1 - expert), -(1 << 62))
    chosen, picked = tl.zeros((K,), tl.int64), tl.zeros((K,), tl.float32)
    for i in range(k):
        greatest = tl.max(order, 0)
        where = order == greatest
        chosen = tl.where(slot == i, tl.max(tl.where(where, expert, 0), 0).to(tl.int64), chosen)
        picked = tl.where(slot == i, tl.sum(tl.where(where, scores, 0.0), 0), picked)
        order = tl.where(where, -(1 << 62), order)
    return chosen, picked / tl.sum(picked, 0) * scale


@triton.jit
def _look_up(logits: Pointer, table: Pointer, ids: Pointer, weights: Pointer, experts: Pointer, n: int, vocabulary: int, k: int,
             scale: float, K: tl.constexpr) -> None:
    token, slot = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    chosen, share = listed(logits + token * n, table, ids + token, n, vocabulary, k, scale, K)
    tl.store(weights + token * k + slot, share, slot < k)
    tl.store(experts + token * k + slot, chosen, slot < k)


@triton.jit
def listed(logits: Pointer, table: Pointer, ids: Pointer, n: int, vocabulary: int, k: int, scale: float,
           K: tl.constexpr) -> tuple[Block, Block]:
    """The experts int64 [K] of the token whose id `ids` points at, in the table's order, and their weights."""
    slot = tl.arange(0, K)
    number = tl.load(ids) + tl.zeros((K,), tl.int64)
    known = (number >= 0) & (number < vocabulary)
    expert = tl.load(table + number * k + slot, (slot < k) & known, -1)
    known = (expert >= 0) & (expert < n)
    scores = tl.where(known, score(tl.load(logits + expert, known, 0.0)), float("nan"))
    scores = tl.where(slot < k, scores, 0.0)
    return tl.where(known, expert, 0), scores / tl.sum(scores, 0) * scale


AHEAD = (
    Case(_choose, "*fp32 *fp32 *fp32 *i64 i32:16 i32 fp32", {"N": 256, "K": 8}, warps=1),
    Case(_look_up, "*fp32 *i64 *i64 *fp32 *i64 i32:16 i32:16 i32 fp32", {"K": 8}, warps=1),
)
