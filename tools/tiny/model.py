"""The training model: a batched, differentiable DeepSeek-V4 over whole rows (spec/checkpoint.md sections 3.5 to 3.11).

The weights come from outside as a dict by official name, so that the trainer can hand in rounded copies.
Rows are padded to a multiple of BLOCK; padding at the end never reaches earlier tokens, the model being causal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.numerics import Spread, collapse, linear, mix_scores, rms, rope_frequencies, rotate, sinkhorn

Weights = dict[str, Tensor]
BLOCK = 64  # queries that share their window keys: their own block and those before it that the window reaches


@dataclass
class Trace:
    """What a forward pass tells the trainer besides its result."""

    index_loss: Tensor | None = None  # float32 scalar, sum over the ratio-4 layers
    loads: dict[str, Tensor] = field(default_factory=dict)  # router prefix -> tokens per expert
    links: Tensor | None = None  # int64 [n, 3]: row, asking position, position to read; see `_point`
    link_loss: Tensor | None = None  # float32 scalar, sum over links and layers


class Tiny:
    """The architecture bound to a config; `sparse` makes the indexer's top-k real, otherwise all entries are seen."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.window: int = config["sliding_window"]
        self.eps: float = config["rms_norm_eps"]
        self.sparse = True
        self.teach = False
        self._turns: dict[tuple[bool, int], Tensor] = {}

    def trunk(self, w: Weights, ids: Tensor, trace: Trace) -> Tensor:
        """ids int64 [B, L], L a multiple of BLOCK -> streams float32 [B * L, hc, D] after the last layer."""
        h = F.embedding(ids.flatten(), w["embed.weight"]).float()[:, None].repeat(1, self.config["hc_mult"], 1)
        for layer in range(self.config["num_hidden_layers"]):
            h = self._block(w, f"layers.{layer}.", self.config["compress_ratios"][layer], h, ids, trace)
        return h

    def top(self, w: Weights, h: Tensor, prefix: str = "") -> Tensor:
        """Streams [T, hc, D] -> normalised hidden [T, D]; multiply by `head.weight` for logits."""
        m = mix_scores(h, w[prefix + "hc_head_fn"], self.eps)
        scale, base = w[prefix + "hc_head_scale"], w[prefix + "hc_head_base"]
        pre = torch.sigmoid(m * scale + base[:, None]) + self.config["hc_eps"]
        return rms(collapse(h, pre), w[prefix + "norm.weight"], self.eps)

    def logits(self, w: Weights, ids: Tensor) -> Tensor:
        """ids [B, L] of any length -> float32 logits [B, L, V] (for verification and evaluation)."""
        B, L = ids.shape
        padded = F.pad(ids, (0, -L % BLOCK))
        hidden = self.top(w, self.trunk(w, padded, Trace()))
        return linear(hidden, w["head.weight"]).float().view(B, -1, self.config["vocab_size"])[:, :L]

    def draft(self, w: Weights, h: Tensor, following: Tensor, trace: Trace) -> Tensor:
        """The MTP block: trunk streams h [B * L, hc, D] at p and token ids [B, L] at p + 1 -> hidden for p + 2."""
        e = rms(F.embedding(following.flatten(), w["embed.weight"]), w["mtp.0.enorm.weight"], self.eps)
        e = linear(e, w["mtp.0.e_proj.weight"]).float()
        x = linear(rms(h, w["mtp.0.hnorm.weight"], self.eps), w["mtp.0.h_proj.weight"]).float() + e[:, None]
        return self.top(w, self._block(w, "mtp.0.", 0, x, following, trace), "mtp.0.")

    # one layer

    def _block(self, w: Weights, p: str, ratio: int, h: Tensor, ids: Tensor, trace: Trace) -> Tensor:
        B, L = ids.shape
        y, post, comb = self._pre(w, p + "hc_attn_", h)
        x = rms(y, w[p + "attn_norm.weight"], self.eps).view(B, L, -1)
        h = Spread.apply(h, self._attention(w, p + "attn.", ratio, x, trace).flatten(0, 1).float(), post, comb)
        y, post, comb = self._pre(w, p + "hc_ffn_", h)
        x = rms(y, w[p + "ffn_norm.weight"], self.eps)
        return Spread.apply(h, self._moe(w, p + "ffn.", x, ids.flatten(), trace), post, comb)

    def _pre(self, w: Weights, p: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, eps = self.config["hc_mult"], self.config["hc_eps"]
        m = mix_scores(h, w[p + "fn"], self.eps)
        scale, base = w[p + "scale"], w[p + "base"][:, None]
        pre = torch.sigmoid(m[:n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = (m[2 * n :] * scale[2] + base[2 * n :]).view(n, n, -1)
        return collapse(h, pre), post, sinkhorn(comb, self.config["hc_sinkhorn_iters"], eps)

    # attention

    def turns(self, compressed: bool, count: int) -> Tensor:
        """Unit complex rotations [count, rope_dim / 2] of positions 0 .. count - 1."""
        key = (compressed, count)
        if key not in self._turns:
            angles = torch.arange(count).float()[:, None] * rope_frequencies(self.config, compressed)
            self._turns[key] = torch.polar(torch.ones_like(angles), angles)
        return self._turns[key]

    def _attention(self, w: Weights, p: str, ratio: int, x: Tensor, trace: Trace) -> Tensor:
        B, L, _ = x.shape
        H, dim, back = self.config["num_attention_heads"], self.config["head_dim"], self.window // BLOCK
        rows, keys = BLOCK * H, (back + 1) * BLOCK
        dtype = w[p + "wkv.weight"].dtype
        turns = self.turns(ratio > 0, L)
        qr = rms(linear(x, w[p + "wq_a.weight"]), w[p + "q_norm.weight"], self.eps)
        q = rms(linear(qr, w[p + "wq_b.weight"]).view(B, L, H, dim), None, self.eps) * dim**-0.5
        q = rotate(q, turns[:, None]).to(dtype)
        kv = rotate(rms(linear(x, w[p + "wkv.weight"]), w[p + "kv_norm.weight"], self.eps), turns).to(dtype)

        blocks = F.pad(kv.view(B, -1, BLOCK, dim), (0, 0, 0, 0, back, 0))
        near = torch.cat([blocks[:, i : i + L // BLOCK] for i in range(back + 1)], 2).flatten(0, 1)
        scores = [(q.view(-1, rows, dim) @ near.transpose(1, 2)).view(B, L, H, keys).float()]
        scores[0].add_(_window_mask(L, self.window)[:, None])
        entries = None
        if ratio and ratio <= L:
            entries = self._compress(w, p + "compressor.", ratio, x).to(dtype)
            far = (q.view(B, L * H, dim) @ entries.transpose(1, 2)).view(B, L, H, -1).float()
            far.add_(_entry_mask(L, ratio)[:, None])
            scores.append(self._select(w, p, ratio, x, qr, far, scores[0], trace))
        scores.append(w[p + "attn_sink"].view(1, 1, H, 1).expand(B, L, H, 1))
        exact = torch.cat(scores, -1).softmax(-1)
        if ratio == 4 and trace.links is not None:
            loss = _point(exact[..., keys:-1], trace.links)
            trace.link_loss = loss if trace.link_loss is None else trace.link_loss + loss
        probs = exact.to(dtype)
        out = (probs[..., :keys].reshape(-1, rows, keys) @ near).view(B, L, H, dim)
        if entries is not None:
            out = out + (probs[..., keys:-1].reshape(B, L * H, -1) @ entries).view(B, L, H, dim)
        return self._project(w, p, rotate(out, turns[:, None].conj()))

    def _project(self, w: Weights, p: str, out: Tensor) -> Tensor:
        groups = self.config["o_groups"]
        parts = out.flatten(2).chunk(groups, -1)
        halves = [linear(o, a) for o, a in zip(parts, w[p + "wo_a.weight"].chunk(groups), strict=True)]
        return linear(torch.cat(halves, -1), w[p + "wo_b.weight"])

    def _compress(self, w: Weights, p: str, ratio: int, x: Tensor) -> Tensor:
        """Compressed entries [B, L // ratio, d] of all complete blocks, rotated to their first token's position."""
        B, L = x.shape[0], x.shape[1] // ratio * ratio
        x = x[:, :L]
        ape, dim = w[p + "ape"], w[p + "norm.weight"].shape[0]
        kv = linear(x, w[p + "wkv.weight"]).float().view(B, L // ratio, ratio, -1)
        gate = linear(x, w[p + "wgate.weight"]).float().view(B, L // ratio, ratio, -1) + ape
        if ratio == 4:  # the previous group's first channels join this group's second channels
            kv = torch.cat([F.pad(kv[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0)), kv[..., dim:]], 2)
            before = F.pad(gate[:, :-1, :, :dim], (0, 0, 0, 0, 1, 0), value=float("-inf"))
            gate = torch.cat([before, gate[..., dim:]], 2)
        pooled = (gate.softmax(2) * kv).sum(2)
        return rotate(rms(pooled, w[p + "norm.weight"], self.eps), self.turns(True, L)[::ratio])

    # indexer

    def _select(
        self, w: Weights, p: str, ratio: int, x: Tensor, qr: Tensor, far: Tensor, near: Tensor, trace: Trace
    ) -> Tensor:
        """Mask the entry scores far [B, L, H, N] down to the indexer's choice, and teach the indexer if asked."""
        if ratio != 4:
            return far
        bites = self.sparse and far.shape[-1] > self.config["index_topk"]
        if not (bites or self.teach):
            return far
        index = self._index_scores(w, p + "indexer.", x.detach(), qr.detach())
        visible = _entry_mask(x.shape[1], 4)
        if self.teach:
            loss = _teach(index + visible, far.detach(), near.detach(), w[p + "attn_sink"].detach())
            trace.index_loss = loss if trace.index_loss is None else trace.index_loss + loss
        if not bites:
            return far
        chosen = (index.detach() + visible).topk(self.config["index_topk"], -1).indices
        mask = torch.full_like(index, float("-inf")).scatter_(-1, chosen, 0.0)
        return far + mask[:, :, None]

    def _index_scores(self, w: Weights, p: str, x: Tensor, qr: Tensor) -> Tensor:
        B, L, _ = x.shape
        heads, dim = self.config["index_n_heads"], self.config["index_head_dim"]
        q = linear(qr, w[p + "wq_b.weight"]).view(B, L, heads, dim)
        q = rotate(q, self.turns(True, L)[:, None]).to(w[p + "wq_b.weight"].dtype)
        keys = self._compress(w, p + "compressor.", 4, x).to(q.dtype)
        share = linear(x, w[p + "weights_proj.weight"]).float() * (dim * heads) ** -0.5
        hits = (q.view(B, L * heads, dim) @ keys.transpose(1, 2)).view(B, L, heads, -1).float().relu()
        return (hits * share[..., None]).sum(2)

    # experts

    def _moe(self, w: Weights, p: str, x: Tensor, ids: Tensor, trace: Trace) -> Tensor:
        """x float32 [T, D], ids [T] -> float32 [T, D]: two routed experts and the shared one."""
        k, count = self.config["num_experts_per_tok"], self.config["n_routed_experts"]
        scores = F.softplus(F.linear(x, w[p + "gate.weight"].float())).sqrt()
        if p + "gate.tid2eid" in w:
            chosen = w[p + "gate.tid2eid"][ids]
        else:
            chosen = (scores.detach() + w[p + "gate.bias"]).topk(k, -1).indices
        share = scores.gather(1, chosen)
        share = share / share.sum(-1, keepdim=True) * self.config["routed_scaling_factor"]
        order = chosen.flatten().argsort(stable=True)
        loads = torch.bincount(chosen.flatten(), minlength=count)
        trace.loads[p] = loads
        rows = x.to(w[p + "experts.0.w1.weight"].dtype).index_select(0, order // k).split(loads.tolist())
        shares = share.flatten().index_select(0, order).split(loads.tolist())
        parts = [self._expert(w, f"{p}experts.{e}.", rows[e], shares[e]) for e in range(count)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        routed = torch.cat(parts).index_select(0, back).view(-1, k, x.shape[-1]).float().sum(1)
        return routed + self._expert(w, p + "shared_experts.", x, None).float()

    def _expert(self, w: Weights, p: str, x: Tensor, share: Tensor | None) -> Tensor:
        limit = self.config["swiglu_limit"]
        gate = linear(x, w[p + "w1.weight"]).float().clamp(max=limit)
        act = F.silu(gate) * linear(x, w[p + "w3.weight"]).float().clamp(-limit, limit)
        return linear(act if share is None else act * share[:, None], w[p + "w2.weight"])


_masks: dict[tuple[str, int, int], Tensor] = {}


def _window_mask(L: int, W: int) -> Tensor:
    """float32 [L, keys], 0 where the query may look and -inf elsewhere; the keys end with the query's own block."""
    key = ("window", L, W)
    if key not in _masks:
        q, k = torch.arange(L)[:, None], torch.arange(W + BLOCK)[None] - W
        distance = q % BLOCK - k
        visible = (distance >= 0) & (distance < W) & (q // BLOCK * BLOCK + k >= 0)
        _masks[key] = torch.where(visible, 0.0, float("-inf"))
    return _masks[key]


def _entry_mask(L: int, ratio: int) -> Tensor:
    """float32 [L, L / ratio]: block b is visible once its last token has been processed."""
    key = ("entries", L, ratio)
    if key not in _masks:
        visible = torch.arange(L // ratio)[None] < (torch.arange(L)[:, None] + 1) // ratio
        _masks[key] = torch.where(visible, 0.0, float("-inf"))
    return _masks[key]


def _point(probs: Tensor, links: Tensor) -> Tensor:
    """Minus the log of the attention that half of the heads give the two entries holding the token to be read.

    probs float32 [B, L, H, N]; token t is in the entries t // 4 and t // 4 + 1, which overlap.
    """
    row, asking, place = links.unbind(1)
    seen = probs[row, asking, : probs.shape[2] // 2]
    entries = torch.stack([place // 4, place // 4 + 1], 1)[:, None].expand(-1, seen.shape[1], -1)
    return -seen.gather(2, entries).sum(-1).clamp_min(1e-6).log().mean(1).sum()


def _teach(index: Tensor, far: Tensor, near: Tensor, sink: Tensor) -> Tensor:
    """Cross-entropy of the indexer's distribution over entries to the head-summed attention they get.

    index float32 [B, L, N] (masked), far [B, L, H, N] and near [B, L, H, keys] masked scores, sink [H].
    A position counts by the attention mass its entries have, plus a tenth.
    """
    with torch.no_grad():
        total = torch.logaddexp(torch.logaddexp(far.logsumexp(-1), near.logsumexp(-1)), sink)
        target = (far - total[..., None]).exp().sum(2)
        mass = target.sum(-1, keepdim=True)
        target = target / mass.clamp_min(1e-6) * (mass / far.shape[2] + 0.1)
    seen = index[:, 3:]  # the first three positions see no entry at all
    log_probs = seen.log_softmax(-1).masked_fill(seen == float("-inf"), 0.0)
    return -(target[:, 3:] * log_probs).sum(-1).mean()
