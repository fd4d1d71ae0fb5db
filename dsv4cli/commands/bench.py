"""`dsv4 bench`: how fast a model computes on this machine, beside what its memory allows."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model
from dsv4cli.commands.options import with_settings
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine.bench import Row

HEADINGS = ("depth", "prompt", "decode", "reads", "bandwidth", "bound", "reached")  # so that a row has 80 columns at most


@with_settings("device", "vram", "threads", "numerics", "quiet")
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 512,
    gen: Annotated[int, typer.Option(metavar="N", help="Tokens that are decoded one by one.")] = 64,
    depth: Annotated[str, typer.Option(metavar="N[,N]", help="Tokens of context before each measurement.")] = "0",
    repeat: Annotated[int, typer.Option(metavar="N", help="Measurements, of which the median counts.")] = 3,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Measure how fast a model reads a prompt and decodes.

    Prompt and decoding are each measured after DEPTH tokens of context. The bound is the bandwidth of this machine's
    memory, measured in the same run, over the bytes that a token reads.
    """
    catalog.resolve(model).located()
    depths = depths_of(depth)
    from dsv4cli.commands.opening import prepare_kernels, to_open
    from dsv4cli.engine import bench as engine_bench

    plan = engine_bench.Plan(prompt, gen, depths, repeat)
    asked = to_open(chosen, "device", "vram", "threads", "numerics")
    prepare_kernels(chosen["quiet"])
    with console.progress(chosen["quiet"]) as report:
        rows = list(engine_bench.measure(model, plan, report=report, **asked))
    if json:
        console.print_json([asdict(row) for row in rows])
        return
    console.table(HEADINGS, [_in_words(row) for row in rows], right=range(len(HEADINGS)))


def depths_of(text: str) -> list[int]:
    """Numbers separated by commas. Raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--depth is {text!r}, which is not a list of numbers.", "For example: --depth 0,16384")
    return [int(part) for part in parts]


def _in_words(row: Row) -> list[str]:
    reached = row.decode_tok_s / row.bound_tok_s if row.decode_tok_s and row.bound_tok_s else None
    return [f"{row.depth:,}", _rate(row.prompt_tok_s), _rate(row.decode_tok_s), console.in_bytes(row.bytes_per_token),
            f"{row.bandwidth_gb_s:.1f} GB/s" if row.bandwidth_gb_s else "-", _rate(row.bound_tok_s),
            f"{reached:.0%}" if reached else "-"]


def _rate(value: float | None) -> str:
    return f"{value:.1f} tok/s" if value else "-"
