"""`dsv4 doctor`: what this machine has, where things lie, which settings are in force, what computes and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsv4cli import console, paths, settings
from dsv4cli.commands.arguments import Json

Section = dict[str, Any]


def doctor(
    measure: Annotated[bool, typer.Option(
        "--measure", metavar="", help="First measure memory, disk and GPU link, and keep what they reach.")] = False,
    json: Json = False,
) -> None:
    """Describe this machine and this installation, for yourself or for a report.

    --measure takes some ten seconds, in which a nameless file of 1.1 GB lies on the models' disk.
    """
    from dsv4cli.commands import machine

    if measure:
        measured_now()
    sections: dict[str, Section] = {
        "versions": machine.versions(),
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "gpu": {**machine.gpu(), "models run on it": machine.card()},
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
        console.pairs([(name, _in_words(value)) for name, value in section.items()], indent="  ")
        print()


def measured_now() -> None:
    """Measures this machine and saves what was found. Raises CapacityError without room for that."""
    from dsv4cli.commands.opening import prepare_kernels
    from dsv4cli.engine import machine, measuring

    prepare_kernels(quiet=False)
    with console.working("measuring memory, disk and GPU link ...", quiet=False):
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
    """Per operation and kind of device: which implementation runs, and why."""
    import torch

    from dsv4_kernels import backends as kernels

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {f"{op} on {device}": {"backend": choice.name, "reason": choice.reason}
            for device in devices for op in kernels.OPERATIONS for choice in [kernels.pick(op, device)]}


def _in_words(value: Any) -> str:
    match value:
        case {"value": found, "origin": origin}:
            return f"{'not set' if found is None else _word(found)}  ({origin})"
        case {"backend": name, "reason": reason}:
            return f"{name}: {reason}"
        case {"path": path, "free": free}:
            return f"{path}  ({console.in_bytes(free)} free)"
        case {"bytes_s": rate}:
            return "not measured" if rate is None else f"{console.in_bytes(rate)}/s"
        case {"bytes": size}:
            return "unknown" if size is None else console.in_bytes(size)
    return _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
