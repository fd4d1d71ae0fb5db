"""A plan carried out: pieces encoded in any order by several workers, journalled, and resumed after whatever stopped them.

Memory is a few pieces, whatever the model's size: sources are maps whose pages are let go again. A piece counts as done when its
bytes are on the disk and the journal says so; kill -9 costs at most what came after the last note. The bytes do not
depend on workers or interruptions.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4_quant.drafts import Drafts, draft_of
from dsv4_quant.errors import NotEnoughRoom, WrongUse
from dsv4_quant.files import Source
from dsv4_quant.imatrix import WeightEnergy
from dsv4_quant.journal import Journal
from dsv4_quant.plan import Piece, Plan
from dsv4_quant.quantize import Lookup, encode_piece, no_importance

COMMIT_SECONDS = 2.0  # between two notes in the journal; each waits for the disk
MOST_WORKERS = 8  # unless asked for more: each has pieces of its own in memory
BEGUN_ANEW = "Give the same command again to go on with it, or --force to begin anew."
FULL = "Make room; the same command goes on where it stopped."
# (bytes done, bytes in all, name of the tensor)
Report = Callable[[int, int, str], None]


class Importance(Protocol):
    """An importance matrix: how much errors in each column of each tensor matter."""

    @property
    def keys(self) -> Mapping[str, Any]:
        """What the file will say about it, behind "quantize.imatrix."."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of its content."""
        ...

    def for_tensor(self, name: str, expert: int | None) -> Tensor | None:
        """float32 [columns] for a GGUF tensor, or one expert of a stack; None where nothing is known."""
        ...


def convert(
    plan: Plan,
    source: Source,
    *,
    importance: Importance | None = None,
    workers: int | None = None,
    device: str = "cpu",
    force: bool = False,
    settled: bool = True,
    report: Report = lambda done, total, name: None,
    intact: Callable[[], None] = lambda: None,
) -> None:
    """Writes the plan's files, going on where an earlier run of the same work was stopped. Arguments and errors are
    those of `Conversion`; after KeyboardInterrupt what was finished is noted. Unless it is `settled` by this alone, the journal
    stays beside the finished files until `settle`, and the same call finds them done."""
    with Conversion(plan, source, importance=importance, workers=workers, device=device, force=force, report=report,
                    intact=intact) as work:
        work.encode(work.todo())
        work.finish()
        if settled:
            work.forget()


def settle(plan: Plan) -> None:
    """Nothing is left to be done to the plan's files; without their journal they are never taken for unfinished work."""
    journal_of(plan.output).unlink(missing_ok=True)


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def usual_workers() -> int:
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def device_called(name: str | None) -> str:
    """Where to encode: a GPU when there is one, unless another device is named. Raises WrongUse for one that is not there."""
    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise WrongUse(f"There is no device {name} to encode on: {reason}", "Leave --device out.") from None
    return str(name)


def _prepare(drafts: Drafts, journal: Journal, work: str, force: bool) -> None:
    """Makes the drafts, or finds them as the journal says they are. What is refused leaves no trace."""
    known = journal.resume(work)
    output, parts = drafts.plan.output, drafts.plan.parts
    sources = {info.file.resolve() for info in drafts.plan.source.tensors.values()}
    if known is False and not force:
        raise WrongUse(f"{output} was begun from another source or with other options.", BEGUN_ANEW)
    resumed = bool(known) and drafts.complete(journal.complete)
    try:
        if any(part.path.resolve() in sources for part in parts):
            raise WrongUse(f"{output} is what is being read.", "Choose another -o.")
        for part in parts:  # one that was renamed before the program was stopped is no other's
            if not force and part.path.exists() and (draft_of(part).exists() or not resumed):
                raise WrongUse(f"{part.path} exists already.", "Give --force to replace it, or another -o.")
        drafts.check_room()
    except BaseException:
        if known is None:
            journal.remove()
        raise
    if not resumed:
        journal.wipe()
        drafts.create()
        journal.begin(work)


def _check_importance(plan: Plan, importance: Importance) -> None:
    """Raises WrongUse unless what the matrix says of each tensor fits the tensor."""
    for target in plan.targets:
        for expert in (0, target.experts - 1) if len(target.shape) == 3 else (None,):
            found = importance.for_tensor(target.name, expert)
            if found is not None and tuple(found.shape) != (target.columns,):
                raise WrongUse(
                    f"The importance matrix is of another model: {target.name} has {target.columns} columns, "
                    f"the matrix {list(found.shape)}.",
                    "Collect one for this model with dsv4 imatrix.",
                )


class Halted(Exception):  # noqa: N818 - not an error: the work was told to stop
    """Ends `Conversion.encode` after `halt`; what was finished is noted."""


class Conversion:
    """The work on a plan's files: `encode` pieces in any order, `finish` when all are done, `forget` when the files are safe.

    Without an importance matrix the weights' own energy stands in. `intact` raises where the source changed or could not be
    read; it is asked before anything is noted, so that nothing made of a damaged source counts as done. With `force`
    existing output is replaced and another's unfinished work given up. Entering raises WrongUse for output that exists, other
    unfinished work, and importance of another model, and NotEnoughRoom, which is also what a full disk becomes on leaving.
    """

    def __init__(
        self, plan: Plan, source: Source, *, importance: Importance | None = None, workers: int | None = None,
        device: str = "cpu", force: bool = False, report: Report = lambda done, total, name: None,
        intact: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        if importance is None and plan.weighed:
            importance = WeightEnergy(source)
        elif importance is not None:
            _check_importance(plan, importance)
        self.plan, self.source, self.report, self._intact = plan, source, report, intact
        self.work = plan.fingerprint(importance.fingerprint if importance else "", torch.device(device).type)
        self.total = sum(target.nbytes for target in plan.targets)
        self.done = 0  # bytes
        self._lookup: Lookup = importance.for_tensor if importance is not None else no_importance
        self._workers, self._device, self._force = workers or usual_workers(), device, force
        self._drafts = Drafts(plan)
        self._fresh: list[int] = []  # written, not yet noted
        self._noted = 0.0
        self._busy, self._halted = threading.Lock(), False

    def __enter__(self) -> Conversion:
        self._journal = Journal(journal_of(self.plan.output))
        try:
            _prepare(self._drafts, self._journal, self.work, self._force)
            if not self._journal.complete:
                self._drafts.open()
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        self.done = self.total - sum(piece.nbytes for piece in self.todo())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object = None) -> None:
        self.halt()
        with self._busy:  # another thread's pieces are written and noted
            self._drafts.close()
            self._journal.close()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise NotEnoughRoom(
                f"The disk is full: {self.plan.output} needs {self.plan.nbytes:,} bytes in all.", FULL
            ) from None

    def todo(self) -> Iterator[Piece]:
        """The pieces that are not done."""
        if self._journal.complete:
            return iter(())
        return (piece for piece in self.plan.each_piece() if piece.number not in self._journal.done)

    def encode(self, pieces: Iterable[Piece]) -> None:
        """Encodes and writes; whatever ends it early, what was finished is noted. Raises as `encode_piece`, and Halted."""
        pieces = iter(pieces)
        with self._busy:
            if self._halted:
                raise Halted
            threads = torch.get_num_threads()
            torch.set_num_threads(max(1, threads // self._workers))
            self._noted = time.monotonic()
            pool = ThreadPoolExecutor(self._workers)
            running = {pool.submit(self._one, piece) for piece in islice(pieces, 2 * self._workers)}
            try:
                while running:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self._finished(future.result())
                    if self._halted:
                        raise Halted
                    running |= {pool.submit(self._one, piece) for piece in islice(pieces, len(finished))}
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
                self._fresh += [future.result().number for future in running if _went_well(future)]
                torch.set_num_threads(threads)
                self._note()

    def halt(self) -> None:
        """Ends `encode` soon, whichever thread is in it."""
        self._halted = True

    def finish(self) -> None:
        """Checks the files and gives them their names. All pieces must be done."""
        if not self._journal.complete:
            self._drafts.check()
            self._journal.finish()
        self._drafts.publish()

    def forget(self) -> None:
        """Removes the journal: from here on the same work would begin anew."""
        self._journal.remove()

    def _one(self, piece: Piece) -> Piece:
        self._drafts.write(piece.target.part, piece.offset, encode_piece(self.source, piece, self._lookup, self._device))
        return piece

    def _finished(self, piece: Piece) -> None:
        self._fresh.append(piece.number)
        self.done += piece.nbytes
        self.report(self.done, self.total, piece.target.name)
        if time.monotonic() - self._noted > COMMIT_SECONDS:
            self._note()

    def _note(self) -> None:
        self._drafts.sync()
        self._intact()
        self._journal.add(self._fresh)
        self._fresh, self._noted = [], time.monotonic()


def _went_well(future: Future[Piece]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
