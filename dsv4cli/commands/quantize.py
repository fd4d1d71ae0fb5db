"""`dsv4 quantize`: from a checkpoint or a GGUF to a smaller GGUF."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model
from dsv4cli.commands.options import with_settings
from dsv4cli.errors import Interrupted, UsageError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4_quant.metadata import Origin
    from dsv4_quant.plan import Plan
    from dsv4cli.registry.catalog import Entry

RECIPES = "mxfp4|q4|q3|q2|q1"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PLAIN_SECONDS = 10.0  # between two lines where no bar can be drawn
TYPES, FILES = "Types", "Files"


def _type(role: str, what: str) -> Any:
    flag = f"--{role}"
    return typer.Option(flag, metavar="TYPE", rich_help_panel=TYPES, help=f"{what}: a type, or like q4_k,0-3=q8_0 by layer.")


@with_settings("device", "quiet")
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
    mtp: Annotated[bool, typer.Option("--mtp", metavar="", rich_help_panel=FILES,
                                      help="Write the MTP block, as a file of its own, instead of the model.")] = False,
    dspark: Annotated[bool, typer.Option("--dspark", metavar="", rich_help_panel=FILES,
                                         help="Write the DSpark stages, as a file of their own, instead.")] = False,
    split_max_size: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="SIZE", rich_help_panel=FILES, help="Split into files of at most this size: 40GB.")] = None,
    force: Annotated[bool, typer.Option("--force", metavar="", rich_help_panel=FILES,
                                        help="Replace the output, or begin anew.")] = False,
    workers: Annotated[Optional[str], typer.Option(metavar="N", help="Tensors at a time. Default: one a core.")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Print what would be written, and stop.")] = False,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Make a smaller GGUF of a model, for dsv4 and llama.cpp.

    Reads a checkpoint folder or a GGUF, a few tensors at a time, whatever the model's size. Stopped in any way, the same command
    goes on where it was. Types: f32 f16 bf16 q8_0 q6_k q5_k q4_k iq4_xs mxfp4 q3_k iq3_xxs q2_k iq2_xs iq2_xxs iq1_m.
    """
    named = {"experts": experts, "down": down, "attention": attention, "shared": shared, "output": output, "embed": embed,
             "indexer": indexer}
    changes = {role: kind for role, kind in named.items() if kind is not None}
    count = _count(workers)
    entry = catalog.resolve(source)
    plan = planned(entry, out, recipe, changes, "mtp" if mtp else "dspark" if dspark else "none",
                   size_of(target_size, "--target-size"), size_of(split_max_size, "--split-max-size"))
    if not chosen["quiet"] or dry_run:
        (print_json if json else print_plan)(plan)
    if not dry_run:
        carry_out(plan, count, chosen["device"], force, chosen["quiet"])


def planned(entry: Entry, out: str, recipe: str | None, changes: dict[str, str], stages: Any, target_size: int | None,
            part_size: int | None) -> Plan:
    """What is to be written, from the source's header."""
    from dsv4_quant import recipe as recipes
    from dsv4_quant.files.headers import read_header
    from dsv4_quant.plan import make_plan

    if recipe is None and target_size is None:
        raise UsageError("There is no recipe.", f"Give --recipe {RECIPES}, or --target-size.")
    chosen = recipes.named(recipe or "q2")
    rules = recipes.rules_of(changes)
    said = [recipe or f"at most {target_size:,} bytes", *(f"--{role} {kind}" for role, kind in sorted(changes.items()))]
    header = read_header(entry.located())
    path = output_path(entry, out, "-".join(said[:1]) if recipe else "fitted", stages)
    return make_plan(header, path, chosen, _origin(entry, header.metadata, " ".join(said)), changes=rules, stages=stages,
                     target_size=target_size, part_size=part_size)


def output_path(entry: Entry, out: str, recipe: str, stages: str) -> Path:
    """The file to write. In a folder it is named after the model; a drafter begins with what it is, as in llama.cpp."""
    path = Path(out).expanduser()
    if path.is_dir():
        name = re.sub(r"[^\w.-]+", "-", entry.name.removesuffix(".gguf"))
        return path / f"{'' if stages == 'none' else stages + '-'}{name}-{recipe.upper()}.gguf"
    if path.suffix != ".gguf":
        raise UsageError(f"{out} is neither a folder nor the name of a .gguf file.", f"Write -o {out}.gguf.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.absolute().parent} for {path.name}.", "Create it, or choose another -o.")
    return path


def _origin(entry: Entry, metadata: dict[str, Any], recipe: str) -> Origin:
    """What to say about the weights; a GGUF of no known repository keeps the name that it gives itself."""
    from dsv4_quant.metadata import Origin

    name = (entry.repo or str(metadata.get("general.name") or entry.name)).rpartition("/")[2].removesuffix(".gguf")
    return Origin(name, entry.repo, entry.revision, entry.license or None, recipe, chat_template(entry.release))


def chat_template(release: str) -> str | None:
    """The Jinja text that servers render messages with."""
    return None


def carry_out(plan: Plan, workers: int | None, device: str | None, force: bool, quiet: bool) -> None:
    """Writes the files. Raises Interrupted after Ctrl-C, having said how to go on."""
    with console.working("opening torch…", quiet):
        from dsv4_quant.convert import convert, device_called
        from dsv4_quant.files import open_source

        source = open_source(plan.source.path)
    started = time.monotonic()
    try:
        with _reporting(quiet) as report:
            convert(plan, source, workers=workers, device=device_called(device), force=force, report=report)
    except KeyboardInterrupt:
        console.note(f"Stopped. The same command goes on with {plan.output}.")
        raise Interrupted("Stopped.") from None
    if not quiet:
        for part in plan.parts:
            console.note(f"{part.path}: {part.nbytes:,} bytes")
        console.note(f"{time.monotonic() - started:.0f} s")


def print_plan(plan: Plan) -> None:
    """A line a role: tensors, types before and after, bytes, bits a weight."""
    from dsv4cli.engine.memory import in_bytes

    rows = [(row["role"], f"{row['tensors']:,}", row["from"], row["to"], in_bytes(row["bytes"]), f"{row['bits']:.2f}")
            for row in summary(plan)]
    console.table(("ROLE", "TENSORS", "FROM", "TO", "SIZE", "BITS"), rows, right=[1, 4, 5])
    files = f" in {len(plan.parts)} files" if len(plan.parts) > 1 else ""
    print(f"{plan.parts[0].path if files else plan.output}: {plan.nbytes:,} bytes{files}")


def print_json(plan: Plan) -> None:
    tensors = [{"name": target.name, "shape": target.shape, "from": target.stored, "to": target.type, "bytes": target.nbytes}
               for target in plan.targets]
    files = [{"path": part.path, "bytes": part.nbytes} for part in plan.parts]
    console.print_json({"roles": list(summary(plan)), "tensors": tensors, "files": files, "bytes": plan.nbytes})


NAMES = {"gate_up": "experts gate, up", "down": "experts down", "shared": "shared experts", "embed": "embedding",
         "output": "head", "rest": "everything else"}


def summary(plan: Plan) -> Iterator[dict[str, Any]]:
    """The plan by role, and all of it; norms, mixers, routers and compressors are one role."""
    groups: dict[str, list[Any]] = {}
    for target in sorted(plan.targets, key=lambda target: target.slot == "rest"):
        groups.setdefault(NAMES.get(target.slot, target.slot), []).append(target)
    for name, targets in (*groups.items(), ("total", list(plan.targets))):
        nbytes, weights = sum(target.nbytes for target in targets), sum(target.weights for target in targets)
        yield {"role": name, "tensors": len(targets), "from": _kinds(targets, "stored"), "to": _kinds(targets, "type"),
               "bytes": nbytes, "bits": 8 * nbytes / weights}


def _kinds(targets: list[Any], which: str) -> str:
    """The types, the commonest first."""
    weights: dict[str, int] = {}
    for target in targets:
        kind = getattr(target, which)
        weights[kind] = weights.get(kind, 0) + target.weights
    return ", ".join(sorted(weights, key=lambda kind: -weights[kind]))


@contextmanager
def _reporting(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal's stderr, a line now and then elsewhere."""
    import sys

    if quiet or not console.coloured(sys.stderr):
        yield (lambda done, total, name: None) if quiet else _Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TransferSpeedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console.err(), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


class _Lines:
    """Progress for logs."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, total: int, name: str) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.said < PLAIN_SECONDS:
            return
        rate = (done - self.first) / (now - self.began)
        console.note(f"{100 * done / total:.0f} %  {name}  {rate / 1e9:.3f} GB/s  {(total - done) / max(rate, 1):.0f} s left")
        self.said = now


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
