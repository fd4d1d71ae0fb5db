"""Two optimisers over one set of masters: Muon for hidden matrices, AdamW for the rest; Muon is shared among ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tools.tiny.shape import Spec, specs
from tools.tiny.weights import NOT_TRAINED


def is_hidden_matrix(spec: Spec) -> bool:
    """Muon's share: matrices between hidden spaces, not the embedding, head, router or hyper-connections."""
    return len(spec.shape) == 2 and spec.kind != "f32" and not spec.name.startswith(("embed", "head")) and (
        min(spec.shape) >= 64
    )  # fmt: skip


class Optimiser:
    """Steps the float32 masters in place; every rank does the Newton-Schulz work of its share of the matrices."""

    def __init__(self, masters: dict[str, Tensor], mtp: bool, rank: int, ranks: int,
                 muon_lr: float = 0.02, adam_lr: float = 3e-3) -> None:  # fmt: skip
        chosen = [s for s in specs() if s.kind != "i64" and not s.name.endswith(NOT_TRAINED)]
        chosen = [s for s in chosen if s.name.startswith("mtp.") == mtp]
        self.names = [s.name for s in chosen]
        self.masters, self.rank, self.ranks = masters, rank, ranks
        matrices = [s for s in chosen if is_hidden_matrix(s)]
        self.shares = [[s.name for s in matrices[r::ranks]] for r in range(ranks)]
        rest = [s.name for s in chosen if not is_hidden_matrix(s)]
        slow = [n for n in rest if "hc_" in n or n.endswith(("sink", "ape"))]
        groups = [
            {"params": [masters[n] for n in rest if n not in slow], "lr": adam_lr},
            {"params": [masters[n] for n in slow], "lr": adam_lr},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.muon = torch.optim.Muon(
            [masters[n] for n in self.shares[rank]], lr=muon_lr, momentum=0.95, weight_decay=0.01, ns_steps=4
        )
        self.base = [(g, g["lr"]) for o in (self.adam, self.muon) for g in o.param_groups]

    def step(self, leaves: dict[str, Tensor], weight: Tensor, factor: float) -> float:
        """Sum gradients over ranks, divide by the summed weight, clip, step; returns the gradient norm."""
        parts = [_gradient(leaves[n]).float().flatten() for n in self.names]
        flat = torch.cat([*parts, weight.float().view(1)])
        if self.ranks > 1:
            dist.all_reduce(flat)
        flat = flat[:-1] / flat[-1]
        norm = flat.norm()
        flat *= min(1.0, 1.0 / (norm.item() + 1e-6))
        start = 0
        for name in self.names:
            master = self.masters[name]
            master.grad = flat[start : start + master.numel()].view_as(master)
            start += master.numel()
        for group, lr in self.base:
            group["lr"] = lr * factor
        self.adam.step()
        self.muon.step()
        self._share()
        return norm.item()

    def _share(self) -> None:
        """Every rank sends the matrices it has stepped to the others."""
        for owner, names in enumerate(self.shares if self.ranks > 1 else []):
            flat = torch.cat([self.masters[n].flatten() for n in names])
            dist.broadcast(flat, owner)
            if owner != self.rank:
                for name, part in zip(names, flat.split([self.masters[n].numel() for n in names]), strict=True):
                    self.masters[name].copy_(part.view_as(self.masters[name]))

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])


def _gradient(leaf: Tensor) -> Tensor:
    """Zeros where nothing flowed: an expert without tokens, an indexer that is not taught yet."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
