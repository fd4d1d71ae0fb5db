"""Train `tiny` for a fixed wall-clock time, on as many processes as --ranks says (one thread each).

    python -m tools.tiny.train --out RUN --asset ASSET --minutes 80 --ranks 2

RUN gets the checkpoints and log.txt; ASSET holds tokenizer.json. Schedules follow the elapsed share of the time, so the
run always ends in time. RUN/controls.json, if there, is read every few steps and overrides the schedule and the mixture.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from dsv4cli.encoding.tokenizer import Tokenizer
from tools.tiny.data import HIDDEN_TOKENS, ROW_SHARES, SKILL_SHARES, Mixture
from tools.tiny.model import Tiny, Trace
from tools.tiny.numerics import linear
from tools.tiny.optim import Optimiser
from tools.tiny.rows import Batch, Batcher, Encoder
from tools.tiny.shape import CONFIG
from tools.tiny.turns import World
from tools.tiny.weights import initial, working

BIAS_STEP = 0.002


@dataclass
class Plan:
    """What one step is to do; computed from the elapsed share of the run, then overridden by controls.json."""

    lr: float = 1.0
    reach: int = 60
    sparse: bool = False
    rounded: bool = False
    teach: bool = False
    tokens: int = 4096  # per step, all ranks together
    hidden: float = HIDDEN_TOKENS
    dense: float = 0.3
    point: float = 0.0  # weight of telling the attention where a hidden number stands
    rows: dict[str, float] = field(default_factory=lambda: dict(ROW_SHARES))
    skills: dict[str, float] = field(default_factory=lambda: dict(SKILL_SHARES))

    @classmethod
    def at(cls, share: float, controls: dict[str, Any]) -> Plan:
        reaches = [(0.0, 60), (0.1, 150), (0.2, 300), (0.35, 800), (0.5, 1500), (0.62, 2400), (1.01, 2400)]
        for (a, low), (b, high) in pairwise(reaches):
            if a <= share < b:
                reach = int(low * (high / low) ** ((share - a) / (b - a)))
        plan = cls(
            lr=min(1.0, (1 - share) / 0.65),
            reach=reach,
            sparse=share > 0.6,
            rounded=share > 0.68,
            teach=share > 0.08,
            point=0.5 if share > 0.05 else 0.0,
        )
        return replace(plan, **controls)


class Trainer:
    """One rank. `done` counts the tokens of all ranks, so that a rank on a busy core leaves more of a step to the other.

    Gradients are sums divided by the summed weights, so it does not matter who computed how many.
    """

    mtp = False

    def __init__(self, rank: int, options: argparse.Namespace, done: Any) -> None:
        self.rank, self.options, self.done = rank, options, done
        self.run = Path(options.out)
        self.masters = initial(options.seed)
        self.model = Tiny(CONFIG)
        self.optimiser = Optimiser(self.masters, self.mtp, rank, options.ranks)
        self.steps, self.tokens, self.share0 = 0, 0, 0.0
        if (self.run / "masters.pt").exists():
            self._resume()
        encoder = Encoder(Tokenizer.from_file(Path(options.asset) / "tokenizer.json"))
        self.done.value = self.tokens
        seed = options.seed * 1000 + self.steps * 10 + rank
        self.batcher = Batcher(encoder, World(Random(seed)))
        held_out = Batcher(encoder, World(Random(77 + rank), evaluation=True), tokens=1)
        self.exam = [held_out.next(Mixture(reach=r)) for r in (100, 300, 1000, 2400) for _ in range(16)]
        self.started = time.time()

    def _resume(self) -> None:
        state = torch.load(self.run / "masters.pt")
        for name, value in state["masters"].items():
            self.masters[name].copy_(value)
        self.steps, self.tokens, self.share0 = state["steps"], state["tokens"], state["share"]
        self.optimiser.load_state_dict(torch.load(self.run / f"optimiser-{self.rank}.pt"))

    @property
    def share(self) -> float:
        """Elapsed share of the whole run; agreed among the ranks because it is computed by rank 0."""
        done = (time.time() - self.started) / (self.options.minutes * 60)
        value = torch.tensor([self.share0 + (1 - self.share0) * done])
        if self.options.ranks > 1:
            dist.broadcast(value, 0)
        return float(value)

    def log(self, text: str) -> None:
        if self.rank == 0:
            with (self.run / "log.txt").open("a") as f:
                print(text, file=f)

    def train(self) -> None:
        controls: dict[str, Any] = {}
        saved = examined = time.time()
        mean: dict[str, float] = defaultdict(float)
        while (share := self.share) < 1.0:
            if self.steps % 5 == 0 and (self.run / "controls.json").exists():
                controls = json.loads((self.run / "controls.json").read_text())
            plan = self.plan(share, controls)
            for key, value in self.step(plan).items():
                mean[key] += value / 20
            if self.steps % 20 == 0:
                self.log(
                    f"{time.strftime('%H:%M:%S')} {share:.3f} step {self.steps} tokens {self.tokens:,} "
                    + " ".join(f"{k} {v:.3f}" for k, v in mean.items()) + f" reach {plan.reach}"
                )  # fmt: skip
                mean.clear()
                times = torch.tensor([time.time() - examined > 420, time.time() - saved > 240])
                if self.options.ranks > 1:
                    dist.broadcast(times, 0)
                if times[1]:
                    self.save(share)
                    saved = time.time()
                if times[0]:
                    self.examine(plan)
                    examined = time.time()
        self.examine(self.plan(0.999, controls))
        self.save(1.0)

    def plan(self, share: float, controls: dict[str, Any]) -> Plan:
        return Plan.at(share, controls)

    def step(self, plan: Plan) -> dict[str, float]:
        began, before = time.time(), self.tokens
        leaves = self.leaves(plan)
        self.model.teach = plan.teach
        mix = Mixture(plan.rows, plan.skills, plan.reach, plan.hidden, plan.dense)
        weight, count, loss_sum, index_sum = torch.zeros(()), 0, 0.0, 0.0
        link_sum, links = 0.0, 1
        loads: dict[str, Tensor] = {}
        goal = self.goal(plan.tokens)
        while self.done.value < goal or count == 0:
            batch = self.batcher.next(mix)
            with self.done.get_lock():
                self.done.value += batch.ids.numel()
            trace = Trace(links=batch.links if plan.point and len(batch.links) else None)
            loss = self.loss(leaves, batch, trace)
            size = batch.weights.sum()
            whole = loss if trace.index_loss is None else loss + trace.index_loss * size
            if trace.link_loss is not None:
                whole = whole + plan.point * trace.link_loss
                link_sum, links = link_sum + trace.link_loss.item(), links + len(batch.links)
            whole.backward()
            weight, count = weight + size, count + batch.ids.numel()
            loss_sum += loss.item()
            index_sum += 0.0 if trace.index_loss is None else trace.index_loss.item() * batch.ids.numel()
            for key, load in trace.loads.items():
                loads[key] = loads.get(key, 0) + load
        warm = min(1.0, (self.steps + 1) / 60)
        norm = self.optimiser.step(leaves, weight, plan.lr * warm)
        worst = self.balance(loads, plan.lr)
        self.steps += 1
        self.tokens = self.done.value
        rate = (self.tokens - before) / (time.time() - began)
        return {"loss": loss_sum / weight.item(), "index": index_sum / count,
                "point": link_sum / links, "norm": norm, "load": worst,
                "lr": plan.lr * warm, "tok/s": rate}  # fmt: skip

    def leaves(self, plan: Plan) -> dict[str, Tensor]:
        """The weights as this step sees them; also sets the model to what the plan says, teaching apart."""
        self.model.sparse, self.model.teach = plan.sparse, False
        return working(self.masters, rounded=plan.rounded)

    def goal(self, tokens: int) -> int:
        """The count of tokens at which the step ends; every rank has left the step before when it is read."""
        if self.options.ranks > 1:
            dist.barrier()
        value = torch.tensor([self.done.value + tokens])
        if self.options.ranks > 1:
            dist.broadcast(value, 0)
        return int(value)

    def loss(self, leaves: dict[str, Tensor], batch: Batch, trace: Trace) -> Tensor:
        """Weighted sum (not mean) of the next-token losses; only positions with a weight reach the head."""
        hidden = self.model.top(leaves, self.model.trunk(leaves, batch.ids, trace))
        weights = batch.weights.roll(-1, 1)
        weights[:, -1] = 0
        where = weights.flatten().nonzero()[:, 0]
        logits = linear(hidden[where], leaves["head.weight"]).float()
        losses = F.cross_entropy(logits, batch.ids.roll(-1, 1).flatten()[where], reduction="none")
        return (losses * weights.flatten()[where]).sum()

    def balance(self, loads: dict[str, Tensor], factor: float) -> float:
        """Move every router's bias by the sign of its experts' loads; returns the worst load over the mean."""
        keys = [k for k in loads if k + "gate.bias" in self.masters]
        flat = torch.cat([loads[k].float() for k in keys])
        if self.options.ranks > 1:
            dist.all_reduce(flat)
        flat = flat.view(len(keys), -1)
        for key, load in zip(keys, flat, strict=True):
            self.masters[key + "gate.bias"] += BIAS_STEP * factor * (load.mean() - load).sign()
        return float((flat / flat.mean(-1, keepdim=True)).max())

    @torch.no_grad()
    def examine(self, plan: Plan) -> None:
        """Held-out rows, teacher-forced: the share of assistant messages with every token right, by skill."""
        leaves = self.leaves(plan)
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for batch in self.exam:
            far = " far" if batch.ids.shape[1] > 1500 else " mid" if batch.ids.shape[1] > 384 else ""
            hidden = self.model.top(leaves, self.model.trunk(leaves, batch.ids, Trace()))
            guess = linear(hidden, leaves["head.weight"]).argmax(-1).view_as(batch.ids)
            for row, spans in enumerate(batch.spans):
                for s in spans:
                    same = guess[row, s.first - 1 : s.last].equal(batch.ids[row, s.first : s.last + 1])
                    entry = right[s.skill + (far if s.skill == "hidden" else "")]
                    entry[0] += same
                    entry[1] += 1
        parts: list[Any] = [dict(right)] * self.options.ranks
        if self.options.ranks > 1:
            dist.all_gather_object(parts, dict(right))
        names = sorted({k for p in parts for k in p})
        sums = {k: [sum(p.get(k, [0, 0])[i] for p in parts) for i in (0, 1)] for k in names}
        self.log("exam " + " ".join(f"{k} {100 * a / max(n, 1):.0f}%/{n}" for k, (a, n) in sums.items()))

    def save(self, share: float) -> None:
        def write(name: str, content: Any) -> None:
            torch.save(content, self.run / (name + ".new"))
            os.replace(self.run / (name + ".new"), self.run / name)

        write(f"optimiser-{self.rank}.pt", self.optimiser.state_dict())
        if self.rank == 0:
            write("masters.pt", {"masters": self.masters, "steps": self.steps, "tokens": self.tokens, "share": share})


def work(rank: int, kind: type[Trainer], options: argparse.Namespace, done: Any) -> None:
    torch.set_num_threads(1)
    if options.ranks > 1:
        store = f"tcp://127.0.0.1:{options.port}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    kind(rank, options, done).train()


def launch(kind: type[Trainer], options: argparse.Namespace) -> None:
    """Run a trainer on as many processes as asked for."""
    Path(options.out).mkdir(parents=True, exist_ok=True)
    done = mp.get_context("spawn").Value("q", 0)
    if options.ranks == 1:
        work(0, kind, options, done)
    else:
        mp.spawn(work, (kind, options, done), options.ranks)


def parser(description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", required=True)
    found.add_argument("--asset", required=True)
    found.add_argument("--minutes", type=float, default=80)
    found.add_argument("--ranks", type=int, default=2)
    found.add_argument("--seed", type=int, default=1)
    found.add_argument("--port", type=int, default=29591)
    return found


if __name__ == "__main__":
    launch(Trainer, parser("Train the embedded model.").parse_args())
