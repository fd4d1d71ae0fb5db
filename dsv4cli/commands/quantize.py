"""`dsv4 quantize`: from a checkpoint or a GGUF to a smaller GGUF."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4cli import console
from dsv4cli.commands import quantize_options as options
from dsv4cli.commands import quantize_view as view
from dsv4cli.commands.arguments import Json, Model, size_of
from dsv4cli.commands.options import with_settings
from dsv4cli.commands.quantize_plan import Wanted, planned
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4_quant.convert import Importance
    from dsv4_quant.plan import Plan
    from dsv4cli.registry.catalog import Entry


@with_settings("device", "release", "quiet")
def quantize(
    source: Model, out: options.Out, recipe: options.Recipe = None, target_size: options.TargetSize = None,
    experts: options.Experts = None, down: options.Down = None, attention: options.Attention = None,
    shared: options.Shared = None, output: options.Output = None, embed: options.Embed = None,
    indexer: options.Indexer = None, imatrix: options.Imatrix = None, mtp: options.Mtp = False, dspark: options.Dspark = False,
    split_max_size: options.SplitMaxSize = None, check: options.Check = False, force: options.Force = False,
    workers: options.Workers = None, dry_run: options.DryRun = False, json: Json = False, *, chosen: Settings,
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
        carry_out(plan, importance, count, force, check, chosen)


def _importance(path: str, entry: Entry) -> Importance:
    """The importance matrix, checked against the model."""
    from dsv4_quant.files.headers import read_header
    from dsv4_quant.imatrix import Imatrix

    return Imatrix.open(Path(path).expanduser(), read_header(entry.located()).config)


def carry_out(plan: Plan, importance: Importance | None, workers: int | None, force: bool, check: bool, chosen: Settings) -> None:
    """Writes the files and, with `check`, measures them. Raises Interrupted after Ctrl-C, having said how to go on."""
    quiet = chosen["quiet"]
    with console.working("opening torch…", quiet):
        from dsv4_quant.convert import convert, device_called, settle
        from dsv4_quant.files import open_source
        from dsv4cli.model.files import MappedFiles

        source = open_source(plan.source.path)
        files = MappedFiles(source)
    if plan.weighed and importance is None and not quiet:
        console.note("Without --imatrix a column matters as much as its weights' energy; dsv4 imatrix makes a better guide.")
    started = time.monotonic()
    with console.resumable(plan.output):
        with view.reporting(quiet) as report:
            convert(plan, source, importance=importance, workers=workers, device=device_called(chosen["device"]), force=force,
                    settled=not check, report=report, intact=files.demand_unchanged)
        if not quiet:
            view.print_written(plan, time.monotonic() - started)
        if check:
            _check(plan, chosen["release"], quiet)
            settle(plan)


def _check(plan: Plan, release: str | None, quiet: bool) -> None:
    """Measures the file against its source; the figures go into the file, onto its card and to stdout."""
    from dsv4cli.commands.evaluate import print_divergence
    from dsv4cli.commands.opening import prepare_kernels
    from dsv4cli.engine import quality

    prepare_kernels(quiet)
    with console.progress(quiet) as report:
        rows = quality.check(plan.parts[0].path, plan.source.path, progress=report, release=release)
    print_divergence(rows)


def _count(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 256):
        raise UsageError(f"--workers {text}: that is no number from 1 to 256.", "Leave it out for one a core.")
    return int(text)
