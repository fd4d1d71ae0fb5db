"""`dsv4 doctor`: what this machine has, where things lie, which settings are in force, what computes and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsv4cli import console, paths, settings
from dsv4cli.commands.arguments import Json

Section = dict[str, Any]
DEVICES = ("cpu", "cuda")  # torch calls AMD's cards cuda too


def doctor(
    measure: Annotated[bool, typer.Option(
        "--measure", metavar="", help="First measure memory, disk, GPU and kernels, and keep what they reach.")] = False,
    json: Json = False,
) -> None:
    """Describe this machine and this installation, for yourself or for a report.

    --measure takes some twenty seconds, in which a nameless file of 1.1 GB lies on the models' disk. `dsv4 plan` foretells
    rates from what it finds.
    """
    from dsv4cli.commands import machine

    if measure:
        measured_now()
    sections: dict[str, Section] = {
        "versions": machine.versions(),
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "gpu": {**machine.gpu(), "models run on it": machine.card(), **machine.recorded()},
        "measured": machine.measured(),
        "paths": machine.places(),
        "settings": in_force(),
        "cpu kernels": cpu_kernels(),
        "backends": backends(),
    }
    if json:
        console.print_json(sections)
        return
    for title, section in sections.items():
        print(console.bold(title))
        if title == "backends":
            show_backends(section)
        else:
            console.pairs([(name, _in_words(value)) for name, value in section.items()], indent="  ")
        print()


def measured_now() -> None:
    """Measures this machine and saves what was found. Raises CapacityError without room for that."""
    from dsv4cli.commands.opening import prepare_kernels
    from dsv4cli.engine import machine, measuring

    prepare_kernels(quiet=False)
    with console.working("measuring memory, disk, GPU and kernels ...", quiet=False):
        machine.save(measuring.measure(paths.models()))


def in_force() -> Section:
    """Every setting with its value and origin; None is not set, and whoever uses it has a default."""
    chosen = settings.load()
    return {name: {"value": chosen[name], "origin": chosen.origin(name)} for name in chosen}


def cpu_kernels() -> Section:
    """Our own kernels on this machine: compiled by what and for what, or why there are none."""
    from dsv4_kernels import backends as kernels

    trouble = kernels.cpu_trouble()
    return dict(kernels.cpu_about()) if trouble is None else {"trouble": trouble.message, "what to do": trouble.hint}


def backends() -> Section:
    """Per operation and kind of device: which implementation runs, and why; None where no model can run on that device."""
    from dsv4_kernels import backends as kernels
    from dsv4cli.engine.device import card_trouble

    troubles = {"cpu": None, "cuda": card_trouble()}

    def chosen(op: str, device: str) -> Section:
        if (trouble := troubles[device]) is not None:
            return {"backend": None, "reason": trouble}
        choice = kernels.pick(op, device)
        return {"backend": choice.name, "reason": choice.reason}

    return {f"{op} on {device}": chosen(op, device) for device in DEVICES for op in kernels.OPERATIONS}


def show_backends(section: Section) -> None:
    """A row per operation, a column per device; a reason where what runs was not written for the device, once for each device
    whose reasons are all alike."""
    operations = list(dict.fromkeys(name.partition(" on ")[0] for name in section))
    reasons = {device: {op: section[f"{op} on {device}"]["reason"] for op in operations
                        if section[f"{op} on {device}"]["backend"] in (None, "ref")} for device in DEVICES}
    shared = {device: next(iter(known.values())) for device, known in reasons.items()
              if len(known) == len(operations) and len(set(known.values())) == 1}
    rows = [(op, *(section[f"{op} on {device}"]["backend"] or "-" for device in DEVICES),
             "; ".join(f"{device}: {known[op]}" for device, known in reasons.items() if op in known and device not in shared))
            for op in operations]
    console.table(("operation", *(f"on {device}" for device in DEVICES), ""), rows, indent="  ")
    for device, reason in shared.items():
        print(f"  {device}: {reason}")


def _in_words(value: Any) -> str:
    match value:
        case {"value": found, "origin": origin}:
            return f"{'not set' if found is None else _word(found)}  ({origin})"
        case {"path": path, "free": free}:
            return f"{path}  ({console.in_bytes(free)} free)"
        case {"bytes_s": rate}:
            return "not measured" if rate is None else f"{console.in_bytes(rate)}/s"
        case {"kernel": rates}:
            return ", ".join(f"{what} {console.in_bytes(rate)}/s" for what, rate in rates.items())
        case {"macs_s": rate}:
            return "not measured" if rate is None else f"{rate / 1e9:.1f} billion multiply-adds/s"
        case {"seconds": spent}:
            return "not measured" if spent is None else f"{spent * 1e6:.0f} microseconds"
        case {"limit": limit}:
            return "none" if limit is None else console.in_bytes(limit)
        case {"bytes": size}:
            return "unknown" if size is None else console.in_bytes(size)
    return _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
