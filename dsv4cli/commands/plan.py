"""`dsv4 plan`: what a model will need on this machine, told from its headers before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model, size_of
from dsv4cli.commands.options import with_settings
from dsv4cli.errors import CapacityError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4_quant.files.headers import Header
    from dsv4cli.engine.memory import MemoryPlan


@with_settings("ctx", "numerics")
def plan(
    model: Model,
    ram: Annotated[str | None, typer.Option(
        metavar="SIZE", help="Plan for so much memory (64GB) instead of what this machine has free.")] = None,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Show what a model will need, by purpose, and whether that fits.

    `run` and `chat` make the same plan before they load anything. Weights are read through the system's cache: what is
    counted for them is what has to stay there for decoding at full speed. A model whose routed experts do not fit runs
    from the disk, slower; leaves with 3 when not even the rest fits.
    """
    entry = catalog.resolve(model)
    from dsv4_quant.files.headers import read_header
    from dsv4cli.engine.memory import available_memory, plan_model

    header = read_header(entry.located())
    available = available_memory() if ram is None else size_of(ram, "--ram")
    numerics = chosen["numerics"] or "official"
    made = plan_model(header, entry.name, ctx=chosen["ctx"], numerics=numerics, available=available)
    if json:
        console.print_json({"name": entry.name, "numerics": numerics, **asdict(made), "needed": made.needed, "fits": made.fits,
                            "least": made.least, "runs": made.runs, "on_disk": made.on_disk})
    else:
        console.table(("PURPOSE", "SIZE", "WHERE"), rows(made), right=[1])
    if not made.runs:
        raise CapacityError(f"{entry.name} does not fit: it needs {console.in_bytes(made.least)}, and "
                            f"{console.in_bytes(made.available or 0)} are available.", advice(header, made, numerics))


def rows(made: MemoryPlan) -> list[tuple[str, str, str]]:
    """Purpose, size and place of every part, their sum, and what there is."""
    where = {"weights": "mapped file", "routed experts": made.experts_told() or "mapped file"}
    parts = [(purpose, console.in_bytes(size), where.get(purpose, "memory"))
             for purpose, size in made.sizes().items() if size]
    free = [] if made.available is None else [("available", console.in_bytes(made.available), "")]
    return [*parts, ("needed", console.in_bytes(made.needed), ""), *free]


def advice(header: Header, made: MemoryPlan, numerics: str) -> str:
    """What to change so that it fits: the longest context, halving, that would; else less weight."""
    from dsv4cli.engine.memory import SMALLEST_CONTEXT, plan_model

    tokens = made.context // 2
    while tokens >= SMALLEST_CONTEXT:
        if plan_model(header, "", ctx=tokens, numerics=numerics, available=made.available).runs:
            return f"--ctx {tokens} would fit."
        tokens //= 2
    over: Any = made.least - (made.available or 0)
    return f"No context is short enough: {console.in_bytes(over)} have to go. Choose a smaller quantisation, or more memory."
