"""How far a model's predictions are from a reference's: the measure of what a quantisation costs.

Both models read the same tokens. Of the reference the logits of one window are kept, in a file: so each model's weights
pass through memory once a window, also where memory does not hold both, and a window of any length fits.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4cli import paths
from dsv4cli.console import in_bytes
from dsv4cli.engine.evaluate import CHUNK, Progress, logits_of
from dsv4cli.engine.loaded import Loaded
from dsv4cli.errors import CapacityError, UsageError

SHORT = 512  # tokens: the shorter of the two context lengths
ROWS = 32  # of logits at a time in float64: 33 MB each on the published models


@dataclass(frozen=True)
class Divergence:
    """Of all `tokens` scored in windows of `window`. kl is KL(reference || model) in nats a token, error its standard error;
    top1 the share of tokens to which both give their highest probability."""

    window: int
    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_error: float
    kl_p99: float
    top1: float


def windows_for(ctx: int, tokens: int) -> list[int]:
    """The two context lengths to compare at: a short one and `ctx`, or what the text has; one where both are the same."""
    longest = min(ctx, tokens + 1)  # BOS takes a place
    return sorted({min(SHORT, max(2, longest // 4)) if longest <= SHORT else SHORT, longest})


def encoded(model: Loaded, reference: Loaded, text: str) -> list[int]:
    """The ids of a text. Raises UsageError for an empty text, or models that would not read it as the same tokens."""
    ids = model.tokenizer.encode_text(text)
    if not ids:
        raise UsageError("The text is empty, so there is nothing to score.", "Give at least one character.")
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1] or reference.tokenizer.encode_text(text) != ids:
        raise UsageError(f"{model.name} and {reference.name} do not have the same tokens ({sizes[0]} and {sizes[1]}).",
                         "Compare a model with what it was made from.")
    return ids


def compare(model: Loaded, reference: Loaded, ids: Sequence[int], window: int, *, chunk: int = CHUNK,
            progress: Progress | None = None) -> Divergence:
    """Both models over `ids` (without BOS), in windows of `window` tokens that each begin with BOS; every token counts once.

    Raises UsageError for a window that a model does not have, CapacityError where the disk does not hold the logits of one.
    """
    for each in (model, reference):
        if not 2 <= window <= each.ctx:
            raise UsageError(f"Windows of {window} tokens do not go with {each.name}'s context of {each.ctx}.",
                             f"Choose --ctx between 2 and {each.ctx}.")
    if not ids:
        raise UsageError("There are no tokens to score.", "Give at least one.")
    rows: list[Tensor] = []
    for start in range(0, len(ids), window - 1):
        rows += _window(model, reference, ids[start:start + window - 1], chunk)
        if progress is not None:
            progress(min(start + window - 1, len(ids)), len(ids))
    return _summary(window, torch.cat(rows))


def _summary(window: int, rows: Tensor) -> Divergence:
    """rows float64 [tokens, 4]: the model's loss, the reference's, KL, and whether both agree."""
    losses, expected, kl, agrees = rows.unbind(1)
    error = float(kl.std()) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
    return Divergence(window, len(kl), math.exp(losses.mean()), math.exp(expected.mean()), float(kl.mean()), error,
                      float(np.quantile(kl.numpy(), 0.99)), float(agrees.mean()))


def _window(model: Loaded, reference: Loaded, piece: Sequence[int], chunk: int) -> Iterator[Tensor]:
    """Yields float64 [<= ROWS, 4] for the tokens of one window."""
    inputs = [reference.config.bos_token_id, *piece[:-1]]
    vocab = reference.config.vocab_size
    _demand_room(len(piece) * vocab * 4)
    paths.cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=paths.cache()) as file:
        for logits in logits_of(reference, inputs, chunk=chunk):
            file.write(logits.contiguous().numpy().tobytes())
        file.seek(0)
        targets = iter(torch.tensor(piece).split(ROWS))
        for logits in logits_of(model, inputs, chunk=chunk // ROWS * ROWS or ROWS):
            for part in logits.split(ROWS):
                known = np.frombuffer(file.read(part.numel() * 4), dtype=np.float32).reshape(part.shape)
                yield _compared(part, torch.from_numpy(known.copy()), next(targets))


def _demand_room(wanted: int) -> None:
    folder = next(path for path in (paths.cache(), *paths.cache().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CapacityError(f"The reference's logits of one window take {in_bytes(wanted)}, but {folder} has only "
                            f"{in_bytes(free)} free.", "Choose a smaller --ctx, or point DSV4_CACHE to a larger disk.")


def _compared(logits: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    """Model's and reference's logits [n, vocab], the tokens that follow [n] -> float64 [n, 4] as in `_summary`."""
    ours, theirs = logits.double().log_softmax(1), known.double().log_softmax(1)
    kl = (theirs.exp() * (theirs - ours)).sum(1).clamp(min=0)  # rounding can leave a little less than nothing
    picked = [-each.gather(1, targets[:, None])[:, 0] for each in (ours, theirs)]
    return torch.stack([*picked, kl, (logits.argmax(1) == known.argmax(1)).double()], dim=1)
