"""The options of `dsv4 quantize`, each with what its help says."""

# Typer reads these types at run time, and knows no `X | None` from Python 3.10's syntax alone.
# ruff: noqa: UP045

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from dsv4cli.commands.quantize_plan import RECIPES

TYPES, FILES = "Types", "Files"


def _type(role: str, what: str) -> Any:
    flag = f"--{role}"
    return typer.Option(flag, metavar="TYPE", rich_help_panel=TYPES, help=f"{what}: a type, or like q4_k,0-3=q8_0 by layer.")


Out = Annotated[str, typer.Option("-o", "--out", metavar="OUT.gguf", help="The file to write, or a folder for it.")]
Recipe = Annotated[Optional[str], typer.Option(
    metavar=RECIPES, help="Types by role. mxfp4 holds official experts exactly; q2 is the usual small one.")]
TargetSize = Annotated[Optional[str], typer.Option(
    metavar="SIZE", help="Choose the experts' types layer by layer so that the file has at most this size: 80GB.")]
Experts = Annotated[Optional[str], _type("experts", "Routed experts")]
Down = Annotated[Optional[str], _type("down", "The routed experts' down matrices")]
Attention = Annotated[Optional[str], _type("attention", "Attention")]
Shared = Annotated[Optional[str], _type("shared", "Shared experts")]
Output = Annotated[Optional[str], _type("output", "The head")]
Embed = Annotated[Optional[str], _type("embed", "The embedding")]
Indexer = Annotated[Optional[str], _type("indexer", "The indexer's queries")]
Imatrix = Annotated[Optional[str], typer.Option(
    metavar="FILE", help="How much each column matters, from dsv4 imatrix or llama.cpp.")]
Mtp = Annotated[bool, typer.Option(
    "--mtp", metavar="", rich_help_panel=FILES, help="Write the MTP block, as a file of its own, instead of the model.")]
Dspark = Annotated[bool, typer.Option(
    "--dspark", metavar="", rich_help_panel=FILES, help="Write the DSpark stages, as a file of their own, instead.")]
SplitMaxSize = Annotated[Optional[str], typer.Option(
    metavar="SIZE", rich_help_panel=FILES, help="Split into files of at most this size: 40GB.")]
Check = Annotated[bool, typer.Option(
    "--check", metavar="", help="Then measure the file against its source, and write a model card beside it.")]
Force = Annotated[bool, typer.Option(
    "--force", metavar="", rich_help_panel=FILES, help="Replace the output, or begin anew.")]
Workers = Annotated[Optional[str], typer.Option(metavar="N", help="Pieces at a time. Default: one a core, at most 8.")]
DryRun = Annotated[bool, typer.Option("--dry-run", metavar="", help="Print what would be written, and stop.")]
