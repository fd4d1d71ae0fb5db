"""Opening a model for a command: the engine of the chosen settings, and the facts that the header shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4cli import console
from dsv4cli.commands.arguments import sizes_of
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
    entry, asked = catalog.resolve(model), to_open(chosen)
    if entry.path is None:
        offer(entry)
        entry = catalog.resolve(model)
    usage.note(entry.located(), "used")
    prepare_kernels(chosen["quiet"])
    with console.working(f"opening {entry.name}…", chosen["quiet"]):
        from dsv4cli.engine import Engine

        engine = Engine.open(model, **asked)
    if not chosen["quiet"]:
        for line in warnings(engine.name, engine.plan):
            console.note(line)
    return engine


def to_open(chosen: Settings, *names: str) -> dict[str, Any]:
    """Of the settings for opening (or those of these names), the ones that somebody chose, as the engine takes them."""
    asked = chosen.chosen(*(names or OPENING))
    return {**asked, "vram": sizes_of(asked["vram"], "--vram")} if "vram" in asked else asked


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


def facts(engine: Engine, whole: bool = False) -> list[tuple[str, str]]:
    """What a user wants to know before the first question, as names and values. whole: where a rate comes from as well, or why
    there is none."""
    from dsv4cli.engine.tiers import placed

    plan, experts = engine.plan, placed(engine.plan)
    rate = engine.foretold.told() if whole else engine.foretold.brief()
    cards = [("GPU memory" if len(plan.cards) == 1 else f"GPU {number}", _of(card.needed, card.available))
             for number, card in enumerate(plan.cards)]
    return [
        ("model", engine.name),
        ("release", engine.release),
        ("context", f"{plan.context:,} tokens"),
        *cards,
        ("memory", _of(plan.needed - plan.on_disk, plan.available)),
        *([("experts", experts.told())] if experts.vram or experts.disk else []),
        *([("decode", rate)] if rate else []),
        ("numerics", engine.numerics),
        ("backend", backends(engine)),
    ]


def _of(needed: int, available: int | None) -> str:
    return console.in_bytes(needed) + (f" of {console.in_bytes(available)} available" if available is not None else "")


def details(engine: Engine) -> list[tuple[str, str]]:
    """The facts with the whole memory plan and the architecture."""
    from dsv4cli.engine.memory import told

    held = [(f"plan of GPU {number}", told(card.sizes())) for number, card in enumerate(engine.plan.cards)]
    return [*facts(engine, whole=True), ("device", f"{engine.device}: {engine.device_reason}"), *held,
            ("memory plan", engine.plan.parts()), *architecture(engine.config).items()]


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
