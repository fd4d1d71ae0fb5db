"""`dsv4 list`: the models on this machine."""

from __future__ import annotations

import json as reader
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from dsv4cli import console
from dsv4cli.commands.arguments import Json
from dsv4cli.console import in_bytes
from dsv4cli.registry import catalog, store, usage
from dsv4cli.registry.catalog import Entry


def list_models(json: Json = False) -> None:
    """List the models on this machine (short: ls)."""
    models = [(entry, entry.located()) for entry in catalog.installed()]
    if json:
        console.print_json([
            {"name": entry.name, "path": path, "bytes": store.size(path), "quant": entry.quant,
             "release": entry.release, "context": context(entry, path) or None, "used": usage.when(path, "used"),
             "verified": usage.when(path, "verified"), "repo": entry.repo, "revision": entry.revision,
             "license": entry.license}
            for entry, path in models])
        return
    rows = [(entry.name, in_bytes(store.size(path)), entry.quant, tokens(context(entry, path)), ago(usage.when(path, "used")),
             ago(usage.when(path, "verified")), entry.release, str(path)) for entry, path in models]
    console.table(("NAME", "SIZE", "QUANT", "CONTEXT", "USED", "VERIFIED", "RELEASE", "PATH"), rows, right=[1, 3])
    if sys.stdout.isatty():
        _tell_the_rest({entry.name for entry, _ in models})


def context(entry: Entry, path: Path) -> int:
    """The longest context in tokens; 0 where it would take reading more than a manifest or a config.json."""
    if not entry.context and path.is_dir():
        with suppress(OSError, ValueError, AttributeError):
            return int(reader.loads((path / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 0))
    return entry.context


def tokens(count: int) -> str:
    """1048576 -> '1M', 131072 -> '128K': contexts are powers of two."""
    if not count:
        return "-"
    if count % 1048576 == 0:
        return f"{count // 1048576}M"
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def ago(when: datetime | None) -> str:
    """'never', 'today', 'yesterday', '5 days ago', and the date of what is longer ago than a month."""
    if when is None:
        return "never"
    days = (datetime.now(timezone.utc).date() - when.date()).days
    if days > 30:
        return when.date().isoformat()
    return {0: "today", 1: "yesterday"}.get(days, f"{days} days ago")


def _tell_the_rest(here: set[str]) -> None:
    absent = [name for name in catalog.catalog() if name not in here]
    if absent:
        console.note(f"\nKnown, not on this machine: {', '.join(absent)}. Fetch one: dsv4 pull NAME")
    partial = sorted(store.name_of(folder) for folder in store.unfinished())
    if partial:
        console.note(f"On their way in: {', '.join(partial)}. Go on with: dsv4 pull NAME")
