"""Opening a model for a command: the engine of the chosen settings, and the facts that the header shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4cli import console
from dsv4cli.commands.options import OPENING
from dsv4cli.commands.pull import offer
from dsv4cli.commands.show import architecture
from dsv4cli.registry import catalog, usage
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine import Engine
    from dsv4cli.engine.memory import MemoryPlan


def open_engine(model: str, chosen: Settings) -> Engine:
    """Opens `model`; what nobody chose is left to the engine. Here torch is imported, after the name was found good."""
    entry = catalog.resolve(model)
    if entry.path is None:
        offer(entry)
        entry = catalog.resolve(model)
    usage.note(entry.located(), "used")
    prepare_kernels(chosen["quiet"])
    with console.working(f"opening {entry.name}…", chosen["quiet"]):
        from dsv4cli.engine import Engine

        engine = Engine.open(model, **chosen.chosen(*OPENING))
    if not chosen["quiet"]:
        for line in warnings(engine.name, engine.plan):
            console.note(line)
    return engine


def warnings(name: str, plan: MemoryPlan) -> list[str]:
    """What will make a model slow here, a sentence each; mostly nothing."""
    from dsv4cli.engine.memory import swapped_bytes

    told = []
    if plan.on_disk:
        told.append(f"{name} is larger than the {console.in_bytes(plan.available or 0)} of memory here; {plan.experts_told()}.")
    if plan.swaps(swapped := swapped_bytes()):
        told.append(f"{console.in_bytes(swapped)} of programs are in swap; when they are needed again, memory will be short.")
    return told


def prepare_kernels(quiet: bool) -> None:
    """Has the CPU kernels compiled where they are not yet; says so, and says when it cannot be done."""
    with console.working("opening torch…", quiet):
        from dsv4_kernels import backends as kernels

        built = kernels.cpu_is_built()
    if not built:
        with console.working("compiling the CPU kernels for this machine, once…", quiet):
            kernels.cpu_trouble()
    trouble = kernels.cpu_trouble()
    if trouble is not None and not quiet:
        console.note(f"{trouble.message} Computing with torch instead, which is slow. {trouble.hint}")


def facts(engine: Engine) -> list[tuple[str, str]]:
    """What a user wants to know before the first question, as names and values."""
    plan = engine.plan
    available = f" of {console.in_bytes(plan.available)} available" if plan.available is not None else ""
    return [
        ("model", engine.name),
        ("release", engine.release),
        ("context", f"{plan.context:,} tokens"),
        ("memory", f"{console.in_bytes(plan.needed)}{available}"),
        *([("experts", plan.experts_told().removeprefix("experts "))] if plan.on_disk else []),
        ("numerics", engine.numerics),
        ("backend", backends(engine)),
    ]


def details(engine: Engine) -> list[tuple[str, str]]:
    """The facts with the whole memory plan and the architecture."""
    return [*facts(engine), ("device", f"{engine.device}: {engine.device_reason}"), ("memory plan", engine.plan.parts()),
            *architecture(engine.config).items()]


def backends(engine: Any) -> str:
    """Which implementation computes, in a few words: one name when all operations share it."""
    from dsv4_kernels import backends as kernels

    device = engine.device
    names: dict[str, list[str]] = {}
    for op in kernels.OPERATIONS:
        names.setdefault(kernels.pick(op, device).name, []).append(op)
    if list(names) == ["cpu"]:
        return f"C++ kernels, {kernels.cpu_about()['instructions']}"
    if len(names) == 1:
        return f"{next(iter(names))} on {device}"
    return ", ".join(f"{name} ({', '.join(ops)})" for name, ops in names.items()) + f" on {device}"
