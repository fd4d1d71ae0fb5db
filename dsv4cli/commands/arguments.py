"""The arguments that commands share and that are no settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from dsv4cli.errors import UsageError

Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A name (see dsv4 list), a checkpoint folder, a .gguf file, or owner/repo.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def demand_folder_of(path: Path, flag: str) -> None:
    """Raises UsageError unless the folder that `path`, given as `flag`, is to be written to exists."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.absolute().parent} for {path.name}.", f"Create it, or choose another {flag}.")


def size_of(text: str | None, option: str) -> int | None:
    """Bytes of "80GB" (powers of ten), "74GiB" (of two) or a plain number."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"{option} {text}: that is no size.", "Write it as 80GB or 74.5GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def sizes_of(text: str | None, option: str) -> list[int]:
    """Bytes of "24GB" or "24GB,16GB"; none for None. Raises UsageError as `size_of` does."""
    found = [size_of(part, option) for part in text.split(",")] if text is not None else []
    return [size for size in found if size is not None]
