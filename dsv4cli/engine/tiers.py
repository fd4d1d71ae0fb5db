"""A memory plan as people read it: every byte by tier and purpose, and how many routed experts lie where. No torch here."""

from __future__ import annotations

from typing import NamedTuple

from dsv4_quant.files.headers import Header
from dsv4cli.engine.cards import LAYER, UNREAD, CardShare
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.model import sizes

EXPERTS = "routed experts"
ROLES = {"embed": "embedding", "head": "head", "norm": "norms", "hc": "hyper-connections", "router": "routers",
         "attention": "attention", "compressor": "compressors", "indexer": "indexers", "shared_expert": "shared experts"}
PURPOSES = ("program", "tokenizer", *ROLES.values(), EXPERTS, "expanded weights", "caches", "compressor state", "snapshots",
            "scratch", "index scores", "expert buffers", "pinned buffers", "stages that are not read")
Tiers = dict[str, dict[str, int]]


class Placed(NamedTuple):
    """How many routed experts lie in each tier. All 0 where a small model's are expanded with everything else."""

    vram: int
    ram: int
    disk: int

    def told(self) -> str:
        """In words; "" where there is nothing to say."""
        where = {"VRAM": self.vram, "RAM": self.ram, "the disk": self.disk}
        first, *others = [f"{'on' if 'disk' in tier else 'in'} {tier}" for tier, count in where.items() if count] or [""]
        counts = [count for count in where.values() if count]
        rest = "".join(f", {count:,} {place}" for count, place in zip(counts[1:], others, strict=True))
        return f"{counts[0]:,} of {sum(self):,} {first}{rest}" if counts else ""


def by_tier(header: Header, plan: MemoryPlan) -> Tiers:
    """Bytes by purpose for "GPU" (or "GPU 0", "GPU 1" ...), "RAM" and "disk"; tiers that hold nothing are left out.

    The sum of a tier is what MemoryPlan and CardShare say. RAM has as much of the routed experts as fits; the others, with
    stages that are not read, are only on the disk.
    """
    names = ["GPU"] if len(plan.cards) == 1 else [f"GPU {number}" for number in range(len(plan.cards))]
    tiers = {name: _on_card(header, card, plan.context) for name, card in zip(names, plan.cards, strict=True)}
    tiers["RAM"] = _in_ram(header, plan)
    unread = sum(info.nbytes for role, infos in header.by_role().items() if role in UNREAD for info in infos)
    tiers["disk"] = {EXPERTS: plan.on_disk, "stages that are not read": unread}
    filled = {tier: {what: parts[what] for what in PURPOSES if parts.get(what)} for tier, parts in tiers.items()}
    return {tier: parts for tier, parts in filled.items() if parts}


def placed(plan: MemoryPlan) -> Placed:
    """Where the plan has its routed experts, counted in experts of average size."""
    vram = sum(card.slots for card in plan.cards)
    if not plan.experts:
        return Placed(vram, 0, 0)
    here = plan.routed - vram
    disk = -(-plan.on_disk * here // plan.experts)
    return Placed(vram, here - disk, disk)


def _on_card(header: Header, card: CardShare, tokens: int) -> dict[str, int]:
    layers = range(card.first, card.last)
    return {"program": card.program, **_roles(header, layers, whole=not card.expanded), "expanded weights": card.expanded,
            EXPERTS: card.slots * card.expert, **_state(header, layers, card.state), "snapshots": card.snapshots,
            "scratch": card.scratch, "index scores": card.index_scores, "expert buffers": card.staging}


def _in_ram(header: Header, plan: MemoryPlan) -> dict[str, int]:
    """Of the embedding only what is read; experts that are expanded were read as well."""
    layers, roles = range(header.config.num_hidden_layers), dict[str, int]()
    if not plan.cards:
        roles = _roles(header, layers, whole=True)
        read = 0 if plan.experts else sum(info.nbytes for info in header.by_role()["routed_expert"])
        roles[ROLES["embed"]] += plan.weights - plan.experts - read - sum(roles.values())
        roles[EXPERTS] = read
    return {"program": plan.program, "tokenizer": plan.vocabulary, **roles, "expanded weights": plan.expanded,
            EXPERTS: roles.get(EXPERTS, 0) + plan.experts - plan.on_disk, **_state(header, layers, plan.state),
            "snapshots": plan.snapshots, "scratch": plan.scratch, "pinned buffers": plan.pinned}


def _roles(header: Header, layers: range, whole: bool) -> dict[str, int]:
    """Stored bytes of these layers by role, without routed experts; the ends of the model are with its first and last layer."""
    found = dict.fromkeys(ROLES.values(), 0) if whole else {}
    for role, infos in header.by_role().items() if whole else ():
        for info in infos if role in ROLES else ():
            match = LAYER.match(info.name)
            layer = int(match[1]) if match else (0 if role == "embed" else header.config.num_hidden_layers - 1)
            found[ROLES[role]] += info.nbytes if layer in layers else 0
    return found


def _state(header: Header, layers: range, state: int) -> dict[str, int]:
    """`state` bytes of these layers, split."""
    config = header.config
    pending = sum(sizes.layer_pending_bytes(config, layer) for layer in layers) if state else 0
    return {"caches": state - pending, "compressor state": pending}
