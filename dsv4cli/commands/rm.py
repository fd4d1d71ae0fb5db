"""`dsv4 rm`: take models off this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dsv4cli import console
from dsv4cli.commands.pull import Yes, agreed
from dsv4cli.console import in_bytes
from dsv4cli.errors import Interrupted, UsageError


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models of the models folder or the hub's cache.")],
    yes: Yes = False,
) -> None:
    """Remove models, finished or half fetched, and say how much that frees."""
    from dsv4cli.registry import remove

    removals = [remove.removal(name) for name in names]
    for one in removals:
        where = ", ".join(map(str, one.folders)) or "the hub's cache"
        console.note(f"{one.name}: {in_bytes(one.nbytes)} in {where}.")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("Nothing was removed: nobody can be asked here.", "Give --yes if you are sure.")
        if not agreed("Remove it?" if len(removals) == 1 else "Remove them?", default=False):
            raise Interrupted("Not removed.")
    for one in removals:
        remove.remove(one)
    console.note(f"{in_bytes(sum(one.nbytes for one in removals))} freed.")
