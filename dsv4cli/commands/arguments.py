"""The arguments that commands share and that are no settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsv4cli.errors import UsageError

Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A name (see dsv4 list), a checkpoint folder, a .gguf file, or owner/repo.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]


def demand_folder_of(path: Path, flag: str) -> None:
    """Raises UsageError unless the folder that `path`, given as `flag`, is to be written to exists."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.absolute().parent} for {path.name}.", f"Create it, or choose another {flag}.")
