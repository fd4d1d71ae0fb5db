"""`dsv4 quantize --check`: what a file costs against its source, measured, and written into the file and onto its card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsv4_quant import report
from dsv4cli import paths
from dsv4cli.engine import divergence
from dsv4cli.engine.divergence import Divergence
from dsv4cli.engine.engine import Engine
from dsv4cli.engine.evaluate import Progress
from dsv4cli.engine.loaded import Loaded

LONG = 2048  # tokens: the longer of the two contexts, unless somebody says otherwise


def check(path: Path, reference: str | Path, *, text: str | None = None, ctx: int | None = None,
          progress: Progress | None = None, **opening: Any) -> list[Divergence]:
    """Compares the GGUF at `path` with `reference` at two context lengths, and writes the figures down.

    text: what they read, the evaluation text of dsv4 where it is None; ctx: the longer context; opening: as for Engine.open.
    The figures go into the file's header, where there is room for them, and into the card beside it. Raises what opening a
    model raises, UsageError for models of other tokens, WrongUse for a file that dsv4 did not make.
    """
    report.demand_room(path)
    ours, theirs = Engine.open(path, **opening), Engine.open(reference, **opening)
    found = compared(ours, theirs, text=text, ctx=ctx, progress=progress)
    report.record(path, {"reference": theirs.name, "text": "the evaluation text of dsv4" if text is None else "a text of its own",
                         "numerics": ours.numerics, "contexts": [asdict(each) for each in found]})
    report.write_card(path)
    return found


def compared(ours: Loaded, theirs: Loaded, *, text: str | None = None, ctx: int | None = None,
             progress: Progress | None = None) -> list[Divergence]:
    """What `check` measures, of two open models. Raises UsageError for models of other tokens."""
    ids = divergence.encoded(ours, theirs, evaluation_text() if text is None else text)
    lengths = divergence.windows_for(ctx or min(LONG, ours.ctx, theirs.ctx), len(ids))
    return [divergence.compare(ours, theirs, ids, window, progress=progress) for window in lengths]


def evaluation_text() -> str:
    """What models are compared over unless a text is given. Nothing of it is in the calibration set."""
    return paths.bundled("evaluation.txt").read_text(encoding="utf-8")
