"""`dsv4 verify`: hash models again, and fetch again what is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsv4cli import console
from dsv4cli.commands import transfer
from dsv4cli.commands.pull import Quiet, Rate, Workers
from dsv4cli.console import in_bytes
from dsv4cli.errors import CorruptError
from dsv4cli.registry import catalog

if TYPE_CHECKING:
    from dsv4cli.registry.catalog import Entry
    from dsv4cli.registry.verify import Bad


def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="The model. Without it: all.")] = None,
    repair: Annotated[bool, typer.Option("--repair", metavar="", help="Fetch damaged files again, and only those.")] = False,
    max_workers: Workers = 4,
    limit_rate: Rate = None,
    quiet: Quiet = False,
) -> None:
    """Hash the files of a model again, and compare with what was published.

    Exit code 4 if something is damaged and was not repaired.
    """
    rate = transfer.rate_limit(limit_rate)
    damaged = []
    for entry in [catalog.resolve(name)] if name else list(catalog.installed()):
        bad = _checked(entry, quiet)
        if bad and repair:
            _repaired(entry, bad, max_workers, rate, quiet)
        elif bad:
            damaged.append(entry.name)
    if damaged:
        raise CorruptError(f"Damaged: {', '.join(damaged)}.", f"Repair it: dsv4 verify {damaged[0]} --repair")


def _checked(entry: Entry, quiet: bool) -> list[Bad]:
    """Hashes a model's files and tells the result."""
    from dsv4cli.registry.verify import check

    examined = check(entry)
    state = transfer.watch(examined.run(), f"verifying {entry.name}", quiet)
    for bad in examined.bad:
        console.note(f"{entry.name}: {bad.path} {bad.reason}.")
    if not examined.bad and not quiet:
        if examined.files:
            told = (f"{len(examined.files)} files, {in_bytes(state.total)}, are as published "
                    f"(read at {in_bytes(int(state.rate))}/s)")
        else:
            told = "the headers are sound; nothing says what the rest should hold"
        console.note(f"{entry.name}: {told}.")
    return examined.bad


def _repaired(entry: Entry, bad: list[Bad], workers: int, rate: float | None, quiet: bool) -> None:
    from dsv4cli.registry.verify import check
    from dsv4cli.registry.verify import repair as fetch

    transfer.watch(fetch(entry, bad, workers, rate), f"repairing {entry.name}", quiet)
    again = check(entry)
    again.files = tuple(one for one in again.files if one[0] in {one.path for one in bad})
    transfer.watch(again.run(), f"verifying {entry.name}", quiet)
    if again.bad:
        raise CorruptError(f"{entry.name}: {again.bad[0].path} {again.bad[0].reason}, although it was fetched again.",
                           "The disk may be failing; look at its health.")
    if not quiet:
        console.note(f"{entry.name}: {', '.join(one.path for one in bad)} fetched again; all files are as published.")
