"""`dsv4 pull`: a model from the Hugging Face hub, verified and resumable; and the offer to do so where one is missing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4cli import console, paths
from dsv4cli.commands import transfer
from dsv4cli.commands.quantize_plan import RECIPES
from dsv4cli.console import in_bytes
from dsv4cli.errors import Interrupted, UsageError
from dsv4cli.registry import catalog

if TYPE_CHECKING:
    from dsv4cli.registry.catalog import Entry
    from dsv4cli.registry.pull import Plan

Yes = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Say nothing but errors.")]
Workers = Annotated[int, typer.Option("--max-workers", metavar="N", min=1, max=64, help="Files to fetch at once. Default: 4.",
                                      show_default=False)]
Rate = Annotated[str | None, typer.Option("--limit-rate", metavar="RATE", show_default=False,
                                          help="Bytes a second for all files together, like 500K or 20M.")]


def pull(
    name: Annotated[str, typer.Argument(
        metavar="NAME", help="A name (see dsv4 list) or owner/repo[@revision][:file-or-quant].")],
    include: Annotated[list[str] | None, typer.Option(
        "--include", metavar="PATTERN", show_default=False,
        help="Fetch more files of the repo, like 'inference/*' (may be given several times).")] = None,
    update: Annotated[bool, typer.Option(
        "--update", metavar="", help="Replace an installed model by the hub's newest revision.")] = False,
    quant: Annotated[str | None, typer.Option(
        "--quant", metavar=RECIPES, show_default=False,
        help="Make a smaller GGUF of a checkpoint while it arrives, with a recipe of dsv4 quantize.")] = None,
    keep_source: Annotated[bool, typer.Option(
        "--keep-source", metavar="", help="With --quant: install the checkpoint too, instead of deleting used shards.")] = False,
    max_workers: Workers = 4,
    limit_rate: Rate = None,
    yes: Yes = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a model from the Hugging Face hub.

    Interrupted at any moment, it goes on where it was when it is called again. Every file is checked against the hub's SHA-256.
    With --quant, no more than the result and two shards of the checkpoint are on the disk at any time.
    """
    named, rate = catalog.resolve(name), transfer.rate_limit(limit_rate)
    entry = catalog.made(catalog.source_of(named), quant) if quant else named
    if (include or keep_source) and bool(include) == bool(entry.recipe):
        raise UsageError("--keep-source goes with --quant, and --include without it.", "Leave it out.")
    if entry.path and entry.repo and not update:
        _look_for_newer(entry, quiet)
        return
    from dsv4cli.registry import pull as puller

    plan = puller.plan(catalog.source_of(named), include or (), newest=update)
    if update and entry.path and plan.listing.commit == entry.revision:
        _say(f"{entry.name} is the hub's newest revision already ({plan.listing.commit[:12]}).", quiet)
    elif entry.recipe:
        _quantised(plan, entry, keep_source, rate, yes, quiet)
    else:
        carry_out(plan, max_workers, rate, yes, quiet)


def carry_out(plan: Plan, workers: int = 4, rate: float | None = None, yes: bool = False, quiet: bool = False) -> None:
    """Shows the plan, asks where somebody can answer, fetches. Raises Interrupted if the answer is no."""
    from dsv4cli.registry.pull import Pull

    plan.check_disk()
    if not quiet:
        for line in described(plan):
            console.note(line)
    if not yes and sys.stdin.isatty() and not agreed("Fetch it?"):
        raise Interrupted("Not fetched.")
    state = transfer.watch(Pull(plan, workers, rate).run(), plan.entry.name, quiet)
    count = f"{in_bytes(state.fetched)} fetched, {len(plan.files)} files verified"
    _say(f"{plan.entry.name} is here: {count}, in {plan.target}.", quiet)


def _quantised(plan: Plan, made: Entry, keep: bool = False, rate: float | None = None, yes: bool = False,
               quiet: bool = False) -> None:
    """The same for a model that is made of the plan's checkpoint while it arrives."""
    from dsv4cli.commands import pull_quantised
    from dsv4cli.registry.streamed import Streamed

    manner = pull_quantised.Manner(rate, quiet, lambda question: yes or not sys.stdin.isatty() or agreed(question))
    pull_quantised.carry_out(Streamed(plan, made, keep and plan.entry.path is None), manner)


def described(plan: Plan) -> list[str]:
    """What will be fetched, from where, whether it fits, how long it takes."""
    license = plan.entry.license or plan.listing.license
    source = f"{plan.listing.repo} at {plan.listing.commit[:12]}{f', license {license}' if license else ''}"
    here = f", {in_bytes(plan.present)} of it here already" if plan.present else ""
    seconds = plan.seconds()
    time = f"; about {transfer.duration(seconds)} at the rate of the last download" if seconds is not None else ""
    return [f"{plan.entry.name}: {len(plan.files)} files, {in_bytes(plan.total)}{here}, from {source}.",
            f"To fetch: {in_bytes(plan.missing)}; free on the disk of {paths.models()}: {in_bytes(plan.free)}{time}."]


def offer(entry: Entry) -> None:
    """Asks whether to fetch a model that is not here; returns when it is. Raises Dsv4Error where nobody can answer."""
    if not (entry.repo and sys.stdin.isatty() and sys.stderr.isatty()):
        entry.located()
        return
    console.note(f"{entry.name} is not on this machine.")
    from dsv4cli.registry import pull as puller

    plan = puller.plan(catalog.source_of(entry))
    if entry.recipe:
        _quantised(plan, entry)
    else:
        carry_out(plan)


def agreed(question: str, default: bool = True) -> bool:
    """The answer of whoever sits at the terminal; Enter means `default`, the end of input no."""
    print(f"{question} {'[Y/n]' if default else '[y/N]'} ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    return answer.strip().lower() in ("y", "yes") or (default and answer == "\n")


def _look_for_newer(entry: Entry, quiet: bool) -> None:
    """Says that a model is here, and whether the hub has a newer one. Not reaching the hub is no failure then."""
    from dsv4cli.registry import hub
    from dsv4cli.registry.pull import newer

    _say(f"{entry.name} is here: {entry.path}, revision {(entry.revision or 'unknown')[:12]}.", quiet)
    try:
        found = newer(entry)
    except hub.HubError as error:
        _say(f"Whether the hub has a newer one is not known: {error.message}", quiet)
        return
    if found:
        _say(f"The hub has a newer revision, {found.commit[:12]}. Fetch what changed: dsv4 pull {entry.name} --update", quiet)
    else:
        _say("The hub has no newer one.", quiet)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        console.note(text)
