"""The arguments that commands share and that are no settings."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(
    metavar="MODEL", help="A name (see dsv4 list), a checkpoint folder, a .gguf file, or owner/repo.")]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")]
