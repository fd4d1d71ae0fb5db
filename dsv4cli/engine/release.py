"""Which release's chat format a model speaks, when only its files are there to ask.

Nothing in a checkpoint's configuration marks its release. The catalog recognises published files; for others the name
that the file gives itself, or its README, is read. `--release` overrules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4cli.encoding.texts import EFFORT_TEXTS
from dsv4cli.errors import UsageError
from dsv4cli.registry.catalog import Entry

LATER = re.compile(r"deepseek[-_ .]?v4[-_ .]?(flash|pro)[-_ .]?(0731|0813)", re.IGNORECASE)  # both speak 0731's format
README_BYTES = 4096  # the title and the model's own description; further down a card may speak of its successors


def release_of(entry: Entry, metadata: Mapping[str, Any], wanted: str | None) -> str:
    """"april" or "0731": what the user wants, what the catalog knows, or what the files say, in this order."""
    if wanted is not None:
        if wanted not in EFFORT_TEXTS:
            raise UsageError(f"There is no release {wanted!r}.", f"Choose one of {', '.join(EFFORT_TEXTS)}.")
        return wanted
    known = entry.repo is not None or entry.bundled
    return "0731" if not known and LATER.search(_own_words(entry.path, metadata)) else entry.release


def _own_words(path: Path | None, metadata: Mapping[str, Any]) -> str:
    keys = ("general.name", "general.basename", "general.finetune")
    names = [str(metadata[key]) for key in keys if key in metadata]
    readme = path / "README.md" if path and path.is_dir() else None
    if readme and readme.is_file():
        with readme.open("rb") as file:
            names.append(file.read(README_BYTES).decode("utf-8", "replace"))
    return "\n".join(names)
