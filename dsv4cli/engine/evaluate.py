"""Numbers about a model: logits of given ids as a file, perplexity over a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4cli.engine.atomic import whole_file
from dsv4cli.engine.loaded import Loaded
from dsv4cli.errors import UsageError

CHUNK = 128  # tokens per forward: the logits of 512 would be 265 MB on the published models

Progress = Callable[[int, int], None]  # (tokens done, tokens to do)


def write_logits(engine: Loaded, ids: Sequence[int], out: str | Path, *, chunk: int = CHUNK,
                 progress: Progress | None = None) -> None:
    """Writes float32 logits [tokens, vocab] of `ids` to `out` (.npy), a chunk at a time, at once or not at all.

    Raises UsageError for no ids, an id outside the vocabulary, or more ids than the context.
    """
    shape = (len(ids), engine.config.vocab_size)
    pieces = logits_of(engine, ids, chunk=chunk)
    with whole_file(Path(out)) as draft, draft.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        done = 0
        for piece in pieces:
            file.write(piece.numpy().astype("<f4").tobytes())
            done += len(piece)
            if progress is not None:
                progress(done, len(ids))


def logits_of(engine: Loaded, ids: Sequence[int], *, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Yields float32 logits [<= chunk, vocab] until all of `ids` have theirs. The ids are checked at once."""
    if chunk < 1:
        raise UsageError(f"A chunk of {chunk} tokens was asked for.", "Choose 1 or more.")
    engine.check_ids(ids)
    return _logits(engine, ids, chunk)


def _logits(engine: Loaded, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
    state = engine.model.new_state(len(ids))
    for start in range(0, len(ids), chunk):
        yield engine.model.forward(torch.tensor(ids[start:start + chunk]), state, logits="all").float().cpu()


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood in nats over `tokens` scored tokens; error: its standard error."""

    tokens: int
    nll: float
    error: float

    @property
    def value(self) -> float:
        return math.exp(self.nll)


def perplexity(engine: Loaded, ids: Sequence[int], *, window: int = 2048, stride: int | None = None, chunk: int = CHUNK,
               progress: Progress | None = None) -> Perplexity:
    """Perplexity over `ids` (the text's tokens, without BOS) in windows of `window` tokens, a new one every `stride`.

    Every window begins with BOS, as every prompt does. A token is scored once, by the first window that holds it; in a
    window that overlaps the one before, only the last `stride` tokens are new and have at least window - stride - 1
    tokens before them. stride None: windows do not overlap. Raises UsageError for values that leave nothing to score.
    """
    room = window - 1  # BOS takes one place
    stride = room if stride is None else stride
    if not 1 <= stride <= room or window > engine.ctx:
        raise UsageError(f"Windows of {window} tokens, one every {stride}, do not go with a context of {engine.ctx}.",
                         "Choose 2 <= window <= context and 1 <= stride < window.")
    if not ids:
        raise UsageError("The text is empty, so there is nothing to score.", "Give at least one character.")
    losses: list[Tensor] = []
    scored = 0
    for start in range(0, len(ids), stride):
        piece = ids[start:start + room]
        fresh = start + len(piece) - scored
        if fresh > 0:
            losses.append(_losses(engine, piece, chunk)[-fresh:])
            scored += fresh
            if progress is not None:
                progress(scored, len(ids))
    nll = torch.cat(losses)
    error = float(nll.std()) / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return Perplexity(len(nll), float(nll.mean()), error)


def _losses(engine: Loaded, piece: Sequence[int], chunk: int) -> Tensor:
    """Negative log-likelihood [len(piece)], float64, of each token after BOS and those before it."""
    inputs = [engine.config.bos_token_id, *piece[:-1]]
    rows = logits_of(engine, inputs, chunk=chunk)
    starts = range(0, len(piece), chunk)
    return torch.cat([
        torch.nn.functional.cross_entropy(logits.double(), torch.tensor(piece[start:start + chunk]), reduction="none")
        for start, logits in zip(starts, rows, strict=True)])
