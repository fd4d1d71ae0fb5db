"""`dsv4 quantize`: from a checkpoint or a GGUF to a smaller GGUF."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsv4cli import console
from dsv4cli.commands import quantize_view as view
from dsv4cli.commands.arguments import Json, Model
from dsv4cli.commands.options import with_settings
from dsv4cli.commands.quantize_plan import RECIPES, Wanted, planned
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4_quant.convert import Importance
    from dsv4_quant.plan import Plan
    from dsv4cli.registry.catalog import Entry

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
TYPES, FILES = "Types", "Files"


def _type(role: str, what: str) -> Any:
    flag = f"--{role}"
    return typer.Option(flag, metavar="TYPE", rich_help_panel=TYPES, help=f"{what}: a type, or like q4_k,0-3=q8_0 by layer.")


@with_settings("device", "release", "quiet")
def quantize(
    source: Model,
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT.gguf", help="The file to write, or a folder for it.")],
    recipe: Annotated[Optional[str], typer.Option(  # noqa: UP045 - Typer reads it at run time
        metavar=RECIPES, help="Types by role. mxfp4 holds official experts exactly; q2 is the usual small one.")] = None,
    target_size: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="SIZE", help="Choose the experts' types layer by layer so that the file has at most this size: 80GB.")] = None,
    experts: Annotated[Optional[str], _type("experts", "Routed experts")] = None,  # noqa: UP045
    down: Annotated[Optional[str], _type("down", "The routed experts' down matrices")] = None,  # noqa: UP045
    attention: Annotated[Optional[str], _type("attention", "Attention")] = None,  # noqa: UP045
    shared: Annotated[Optional[str], _type("shared", "Shared experts")] = None,  # noqa: UP045
    output: Annotated[Optional[str], _type("output", "The head")] = None,  # noqa: UP045
    embed: Annotated[Optional[str], _type("embed", "The embedding")] = None,  # noqa: UP045
    indexer: Annotated[Optional[str], _type("indexer", "The indexer's queries")] = None,  # noqa: UP045
    imatrix: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="FILE", help="How much each column matters, from dsv4 imatrix or llama.cpp.")] = None,
    mtp: Annotated[bool, typer.Option("--mtp", metavar="", rich_help_panel=FILES,
                                      help="Write the MTP block, as a file of its own, instead of the model.")] = False,
    dspark: Annotated[bool, typer.Option("--dspark", metavar="", rich_help_panel=FILES,
                                         help="Write the DSpark stages, as a file of their own, instead.")] = False,
    split_max_size: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="SIZE", rich_help_panel=FILES, help="Split into files of at most this size: 40GB.")] = None,
    check: Annotated[bool, typer.Option(
        "--check", metavar="", help="Then measure the file against its source, and write a model card beside it.")] = False,
    force: Annotated[bool, typer.Option("--force", metavar="", rich_help_panel=FILES,
                                        help="Replace the output, or begin anew.")] = False,
    workers: Annotated[Optional[str], typer.Option(metavar="N", help="Pieces at a time. Default: one a core, at most 8.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Print what would be written, and stop.")] = False,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Make a smaller GGUF of a model, for dsv4 and llama.cpp.

    Reads a checkpoint folder or a GGUF in small pieces, whatever the model's size.
    Stopped in any way, the same command goes on where it was.

    Types: f32 f16 bf16 q8_0 q6_k q5_k q4_k iq4_xs mxfp4 q3_k iq3_xxs q2_k iq2_xs iq2_xxs iq1_m.
    """
    named = {"experts": experts, "down": down, "attention": attention, "shared": shared, "output": output, "embed": embed,
             "indexer": indexer}
    changes = {role: kind for role, kind in named.items() if kind is not None}
    count = _count(workers)
    if check and (mtp or dspark):
        raise UsageError("--check compares whole models; drafting stages are none.", "Leave it out.")
    entry = catalog.resolve(source)
    importance = _importance(imatrix, entry) if imatrix is not None else None
    wanted = Wanted(out, recipe, changes, "mtp" if mtp else "dspark" if dspark else "none", size_of(target_size, "--target-size"),
                    size_of(split_max_size, "--split-max-size"), chosen["release"])
    plan = planned(entry, wanted, importance)
    if not chosen["quiet"] or dry_run:
        (view.print_json if json else view.print_plan)(plan)
    if not dry_run:
        carry_out(plan, importance, count, chosen["device"], force, chosen["quiet"])
        if check:
            _check(plan, chosen["release"], chosen["quiet"])


def _importance(path: str, entry: Entry) -> Importance:
    """The importance matrix, checked against the model."""
    from dsv4_quant.files.headers import read_header
    from dsv4_quant.imatrix import Imatrix

    return Imatrix.open(Path(path).expanduser(), read_header(entry.located()).config)


def carry_out(plan: Plan, importance: Importance | None, workers: int | None, device: str | None, force: bool,
              quiet: bool) -> None:
    """Writes the files. Raises Interrupted after Ctrl-C, having said how to go on."""
    with console.working("opening torch…", quiet):
        from dsv4_quant.convert import convert, device_called
        from dsv4_quant.files import open_source

        source = open_source(plan.source.path)
    if plan.weighed and importance is None and not quiet:
        console.note("Without --imatrix a column matters as much as its weights' energy; dsv4 imatrix makes a better guide.")
    started = time.monotonic()
    with console.resumable(plan.output), view.reporting(quiet) as report:
        convert(plan, source, importance=importance, workers=workers, device=device_called(device), force=force, report=report)
    if not quiet:
        for part in plan.parts:
            console.note(f"{part.path}: {part.nbytes:,} bytes")
        console.note(f"{time.monotonic() - started:.0f} s")


def _check(plan: Plan, release: str | None, quiet: bool) -> None:
    """Measures the file against its source; the figures go into the file, onto its card and to stdout."""
    from dsv4cli.commands.evaluate import print_divergence
    from dsv4cli.commands.opening import prepare_kernels
    from dsv4cli.engine import quality

    prepare_kernels(quiet)
    with console.progress(quiet) as report:
        rows = quality.check(plan.parts[0].path, plan.source.path, progress=report, release=release)
    print_divergence(rows)


def size_of(text: str | None, option: str) -> int | None:
    """Bytes of "80GB" (powers of ten), "74GiB" (of two) or a plain number."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"{option} {text}: that is no size.", "Write it as 80GB or 74.5GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 256):
        raise UsageError(f"--workers {text}: that is no number from 1 to 256.", "Leave it out for one a core.")
    return int(text)
