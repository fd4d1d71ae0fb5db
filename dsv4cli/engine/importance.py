"""Collecting an importance matrix: a calibration set runs through the model, and what meets each matrix is summed up.

The sums are saved now and then, between two samples; whoever was stopped gives the same command and goes on from there, to
the same file in the end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv4_kernels import backends
from dsv4_quant import imatrix
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.gguf_writer import Entry
from dsv4cli.engine.atomic import whole_file
from dsv4cli.engine.evaluate import Progress, logits_of
from dsv4cli.engine.loaded import Loaded
from dsv4cli.errors import UsageError
from dsv4cli.model.importance import Collector

SAVE_SECONDS = 60.0
PIECE = 512  # tokens that pass together; their logits, 265 MB on the published models, are computed for the head's sake
WORK, DONE = "dsv4.imatrix.work", "dsv4.imatrix.samples_done"


@dataclass(frozen=True)
class Collected:
    """What came of it. `resumed`: samples that an earlier run had done; `unvisited`: (layer, expert) without any token."""

    tokens: int
    samples: int
    resumed: int
    matrices: int
    experts: int
    unvisited: list[tuple[int, int]]


def collect(engine: Loaded, samples: Sequence[Sequence[int]], out: Path, *, dataset: str, window: int,
            progress: Progress | None = None, save_seconds: float = SAVE_SECONDS) -> Collected:
    """Runs `samples` (ids, each a timeline of its own) and writes `out`, a GGUF imatrix, at once or not at all.

    dataset and window are what the file says of them. Raises UsageError for no samples, or ids that the model cannot take.
    """
    if not any(samples):
        raise UsageError("The calibration text is empty.", "Give at least one character.")
    for sample in samples:
        engine.check_ids(sample)
    collector, draft = Collector(engine.model), out.with_name(f"{out.name}.part")
    work = _fingerprint(engine, samples, dataset)
    first = _restored(collector, draft, work)
    total, done = sum(map(len, samples)), sum(map(len, samples[:first]))
    chunks, saved = -(-total // window), time.monotonic()

    def save(path: Path, *more: Entry) -> None:
        imatrix.write(path, collector.entries(), datasets=[dataset], chunks=chunks, chunk_size=window, more=more)

    for number, sample in enumerate(samples[first:], first + 1):
        with backends.watched(collector):
            for logits in logits_of(engine, sample, chunk=PIECE):
                done += len(logits)
                if progress is not None:
                    progress(done, total)
        if time.monotonic() - saved >= save_seconds and number < len(samples):
            with whole_file(draft) as path:
                save(path, Entry(WORK, "str", work), Entry(DONE, "u32", number))
            saved = time.monotonic()
    with whole_file(out) as path:
        save(path)
    draft.unlink(missing_ok=True)
    config = engine.config
    return Collected(total, len(samples), first, len(collector.meters), config.num_hidden_layers * config.n_routed_experts,
                     list(collector.unvisited()))


def _restored(collector: Collector, draft: Path, work: str) -> int:
    """How many samples an earlier run of the same work has done; its sums are taken over."""
    if not draft.is_file():
        return 0
    try:
        found = imatrix.Imatrix.open(draft, collector.model.config)
    except CorruptFile:
        return 0  # drafts are only ours, and nobody else's hope hangs on them
    if found.metadata.get(WORK) != work or set(found.entries) != set(collector.meters):
        return 0
    collector.restore(dict(found.entries))
    return int(found.metadata[DONE])


def _fingerprint(engine: Loaded, samples: Sequence[Sequence[int]], dataset: str) -> str:
    digest = hashlib.sha256(f"{engine.fingerprint} {dataset} {PIECE}".encode())
    for sample in samples:
        digest.update(",".join(map(str, sample)).encode() + b";")
    return digest.hexdigest()


def in_windows(ids: Sequence[int], bos: int, window: int) -> Iterator[list[int]]:
    """A text's ids as timelines of at most `window` tokens that begin with BOS."""
    for start in range(0, len(ids), window - 1):
        yield [bos, *ids[start:start + window - 1]]


def named(unvisited: Sequence[tuple[int, int]]) -> str:
    """ "layer 3: 5, 17; layer 4: 9"."""
    layers: dict[int, list[int]] = {}
    for layer, expert in unvisited:
        layers.setdefault(layer, []).append(expert)
    return "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in layers.items())
