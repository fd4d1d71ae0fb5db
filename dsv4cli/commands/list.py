"""`dsv4 list`: the models on this machine."""

from __future__ import annotations

import sys

from dsv4cli import console
from dsv4cli.commands.arguments import Json
from dsv4cli.registry import catalog, store


def list_models(json: Json = False) -> None:
    """List the models on this machine (short: ls)."""
    from dsv4cli.engine.memory import in_bytes

    models = [(entry, entry.located()) for entry in catalog.installed()]
    if json:
        console.print_json([
            {"name": entry.name, "path": path, "bytes": store.size(path), "quant": entry.quant,
             "release": entry.release, "repo": entry.repo, "revision": entry.revision, "license": entry.license}
            for entry, path in models])
        return
    rows = [(entry.name, in_bytes(store.size(path)), entry.quant, entry.release, str(path)) for entry, path in models]
    console.table(("NAME", "SIZE", "QUANT", "RELEASE", "PATH"), rows, right=[1])
    absent = [name for name in catalog.catalog() if name not in {entry.name for entry, _ in models}]
    if absent and sys.stdout.isatty():
        console.note(f"\nKnown, not on this machine: {', '.join(absent)}.")
