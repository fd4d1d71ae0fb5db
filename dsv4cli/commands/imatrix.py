"""`dsv4 imatrix`: which columns of a model's matrices matter, for `dsv4 quantize --imatrix` and for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsv4cli import console
from dsv4cli.commands.arguments import Json, Model, demand_folder_of
from dsv4cli.commands.options import OPENING, with_settings
from dsv4cli.errors import UsageError
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine import Engine
    from dsv4cli.engine.importance import Collected

WINDOW = 1024  # tokens of a timeline, unless --ctx says otherwise


@with_settings(*OPENING, "quiet")
def imatrix(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The file to write, usually NAME.imatrix.gguf.")],
    text: Annotated[Optional[str], typer.Option(  # noqa: UP045 - Typer reads it at run time
        metavar="FILE", help="Text in UTF-8 to collect over; - is stdin. Without it, the set that comes with dsv4.")] = None,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Collect how much each column of a model's matrices is used, which tells a quantiser where errors matter.

    A text runs through the model in timelines of --ctx tokens (1024 unless given). Routed experts are told apart; those that no
    token came to are named. Stopped in any way, the same command goes on where it was. llama.cpp reads the file as well.
    """
    demand_folder_of(out.expanduser(), "--out")
    if out.is_dir():
        raise UsageError(f"{out} is a folder.", f"Name a file in it: -o {out / 'model.imatrix.gguf'}")
    from dsv4cli.commands.evaluate import text_of
    from dsv4cli.commands.opening import open_engine

    words = text_of(text) if text is not None else None
    engine = open_engine(model, chosen)
    found = _collected(engine, words, text, out.expanduser(), chosen)
    if json:
        _print_json(engine, found, out)
    else:
        _print_words(found, out)


def _collected(engine: Engine, words: str | None, name: str | None, out: Path, chosen: Settings) -> Collected:
    """Raises Interrupted after Ctrl-C, having said how to go on."""
    from dsv4cli.engine import calibration, importance

    window = chosen["ctx"] or min(WINDOW, engine.ctx)
    if window < 2:
        raise UsageError(f"Timelines of {window} tokens have no room for a text.", "Choose --ctx 2 or more.")
    if words is None:
        samples, dataset = calibration.samples(engine, window), "dsv4 calibration set"
    else:
        ids = engine.tokenizer.encode_text(words)
        samples, dataset = list(importance.in_windows(ids, engine.config.bos_token_id, window)), Path(name or "").name
    with console.resumable(out), console.progress(chosen["quiet"]) as report:
        return importance.collect(engine, samples, out, dataset=dataset, window=window, progress=report)


def _print_words(found: Collected, out: Path) -> None:
    from dsv4cli.engine.importance import named

    more = f", {found.resumed} of them in an earlier run" if found.resumed else ""
    print(f"{out}: {found.matrices} tensors over {found.tokens:,} tokens in {found.samples:,} timelines{more}")
    if found.unvisited:
        print(f"{len(found.unvisited):,} of {found.experts:,} experts were never visited: {named(found.unvisited)}")
    else:
        print(f"Each of the {found.experts:,} experts was visited.")


def _print_json(engine: Engine, found: Collected, out: Path) -> None:
    unvisited = [{"layer": layer, "expert": expert} for layer, expert in found.unvisited]
    console.print_json({"model": engine.name, "path": out, "tensors": found.matrices, "tokens": found.tokens,
                        "samples": found.samples, "resumed": found.resumed, "experts": found.experts, "unvisited": unvisited})
