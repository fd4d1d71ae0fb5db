"""Training of the MTP block over a finished, rounded trunk (spec/checkpoint.md section 3.11).

    python -m tools.tiny.drafting --trunk RUN --out RUN2 --asset ASSET --minutes 6

The trunk's state of position p and the embedding of token p + 1 predict token p + 2.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tools.tiny.model import Trace
from tools.tiny.numerics import linear
from tools.tiny.rows import Batch
from tools.tiny.train import Plan, Trainer, launch, parser


class DraftTrainer(Trainer):
    """Steps only the weights of `mtp.0.`; everything else stays as the trunk's run left it."""

    mtp = True

    def __init__(self, rank: int, options: argparse.Namespace, done: Any) -> None:
        super().__init__(rank, options, done)
        if self.steps == 0:
            trunk = torch.load(Path(options.trunk) / "masters.pt")["masters"]
            for name, value in trunk.items():
                if not name.startswith("mtp."):
                    self.masters[name].copy_(value)

    def plan(self, share: float, controls: dict[str, Any]) -> Plan:
        return Plan(lr=1 - share, reach=400, sparse=True, rounded=True, **controls)

    def loss(self, leaves: dict[str, Tensor], batch: Batch, trace: Trace) -> Tensor:
        hidden, where, targets, weights = self._guess(leaves, batch, trace)
        logits = linear(hidden[where], leaves["head.weight"].detach()).float()
        return (F.cross_entropy(logits, targets[where], reduction="none") * weights[where]).sum()

    def _guess(self, leaves: dict[str, Tensor], batch: Batch, trace: Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            h = self.model.trunk(leaves, batch.ids, Trace())
        own = {name: leaf if name.startswith("mtp.") else leaf.detach() for name, leaf in leaves.items()}
        hidden = self.model.draft(own, h, batch.ids.roll(-1, 1), trace)
        weights = batch.weights.roll(-2, 1)
        weights[:, -2:] = 0
        return hidden, weights.flatten().nonzero()[:, 0], batch.ids.roll(-2, 1).flatten(), weights.flatten()

    @torch.no_grad()
    def examine(self, plan: Plan) -> None:
        """The share of the assistant's tokens that the block guesses two ahead."""
        leaves = self.leaves(plan)
        hits = torch.zeros(2)
        for batch in self.exam:
            hidden, _, targets, weights = self._guess(leaves, batch, Trace())
            said = (weights >= 1).nonzero()[:, 0]
            guess = linear(hidden[said], leaves["head.weight"]).argmax(-1)
            hits += torch.tensor([float((guess == targets[said]).sum()), float(len(said))])
        if self.options.ranks > 1:
            dist.all_reduce(hits)
        self.log(f"exam draft tokens right {100 * hits[0] / hits[1]:.1f}% of {int(hits[1])}")


def main() -> None:
    options = parser("Train the MTP block of the embedded model.")
    options.add_argument("--trunk", required=True, help="the folder with the finished trunk's masters.pt")
    launch(DraftTrainer, options.parse_args())


if __name__ == "__main__":
    main()
