"""`dsv4 plan`: what a model will need on this machine, told from its headers before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model, size_of, sizes_of
from dsv4cli.commands.options import with_settings
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine.memory import MemoryPlan
    from dsv4cli.engine.tiers import Tiers


@with_settings("ctx", "numerics")
def plan(
    model: Model,
    vram: Annotated[str | None, typer.Option(
        metavar="SIZE[,SIZE]", help="Plan for GPUs with so much free memory each (24GB, or 24GB,24GB).")] = None,
    ram: Annotated[str | None, typer.Option(
        metavar="SIZE", help="Plan for so much memory (64GB) instead of what this machine has free.")] = None,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Show what a model will need, by tier and purpose, and whether that fits.

    `run` and `chat` make the same plan before they load anything. Weights are read through the system's cache: what is
    counted for them is what has to stay there for decoding at full speed. A model whose routed experts do not fit runs
    from the disk, slower; leaves with 3 when not even the rest fits. Without --vram the CPU computes.
    """
    entry = catalog.resolve(model)
    from dsv4_quant.files.headers import read_header
    from dsv4cli.engine import advice, machine, memory, rates, tiers

    header = read_header(entry.located())
    available = memory.available_memory() if ram is None else size_of(ram, "--ram")
    cards, numerics = sizes_of(vram, "--vram"), chosen["numerics"] or "official"

    def planned(ctx: int | None) -> MemoryPlan:
        return memory.plan_model(header, entry.name, ctx=ctx, numerics=numerics, available=available, cards=cards)

    made = planned(chosen["ctx"])
    parts, counts = tiers.by_tier(header, made), tiers.placed(made)
    foretold = rates.foretell(header, made, numerics, machine.load())
    notes = [*advice.left_out(made, len(cards)), *(advice.to_speed_up(header, made) if made.runs else [])]
    if json:
        console.print_json({"name": entry.name, "numerics": numerics, **asdict(made), "needed": made.needed, "fits": made.fits,
                            "least": made.least, "runs": made.runs, "on_disk": made.on_disk, "tiers": parts,
                            "placed": counts._asdict(), "advice": notes,
                            "decode": asdict(foretold)})
    else:
        console.table(("PURPOSE", *parts), rows(made, parts), right=range(1, 1 + len(parts)))
        print()
        console.pairs([("context", f"{made.context:,} tokens"), *([("experts", counts.told())] if counts.told() else []),
                       ("decode", foretold.told()), *(("note", note) for note in notes)])
    advice.demand_fit(header, entry.name, made, planned)


def rows(made: MemoryPlan, parts: Tiers) -> list[tuple[str, ...]]:
    """A row for each purpose with its bytes in every tier, their sums, and what there is."""
    from dsv4cli.engine.tiers import PURPOSES

    free: dict[str, int | None] = dict(zip(parts, (card.available for card in made.cards), strict=False))
    free["RAM"] = made.available
    table = [(what, *(_size(tier.get(what)) for tier in parts.values())) for what in PURPOSES
             if any(what in tier for tier in parts.values())]
    table.append(("needed", *(_size(sum(tier.values())) for tier in parts.values())))
    return [*table, ("available", *(_size(free.get(tier)) for tier in parts))] if any(free.values()) else table


def _size(nbytes: int | None) -> str:
    return console.in_bytes(nbytes) if nbytes else ""
