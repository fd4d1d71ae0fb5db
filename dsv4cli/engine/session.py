"""A session is one timeline of tokens and the model's state after them.

Callers hand over whole token sequences and never say what to keep: `sync` finds the common prefix, extends the timeline
when it can, goes back to the nearest snapshot when it must, and computes only what is missing. Wherever a call ends, by
return, by cancellation or by an error, `ids`, state and logits agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dsv4cli.engine import sessionfile
from dsv4cli.engine.loaded import Loaded
from dsv4cli.engine.memory import PREFILL_CHUNK
from dsv4cli.engine.snapshots import Mark, Shelf
from dsv4cli.errors import CapacityError, Interrupted, UsageError
from dsv4cli.model.state import Snapshot

MOST_MARKS = 12
LEAST_CHUNK = 32  # tokens of a prompt that are computed together however little memory there is

Progress = Callable[[int, int], None]  # (tokens done, tokens to do)
Cancel = Callable[[], bool]


class Session:
    """One mutable timeline over an Engine. Not thread-safe; an Engine may have many."""

    def __init__(self, engine: Loaded) -> None:
        self.engine = engine
        self.ids: list[int] = []
        self.reused = 0  # tokens that the last sync did not have to compute
        self._state = engine.model.new_state(engine.ctx)
        self._logits: Tensor | None = None
        self._shelf = Shelf(MOST_MARKS, engine.plan.shelf)
        self._chunk = PREFILL_CHUNK  # smaller once memory was short

    @property
    def position(self) -> int:
        return len(self.ids)

    @property
    def room(self) -> int:
        """Tokens that still fit into the context."""
        return self.engine.ctx - self.position

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of the snapshots."""
        return self._state.nbytes + self._shelf.nbytes

    @property
    def unrecorded(self) -> str | None:
        """Why decoded tokens are described one by one; None where they are replayed, and where none was decoded yet."""
        recording = self._state.recording
        return None if recording is None else recording.trouble

    def sync(self, ids: Sequence[int], *, marks: Iterable[int] = (), progress: Progress | None = None,
             cancel: Cancel | None = None) -> Tensor:
        """Brings the timeline to exactly `ids` and returns the logits [vocab], float32, of the last one.

        marks: positions worth a snapshot on the way, because a later sequence may leave this one there.
        progress(done, all) is told after each chunk; cancel() is asked before each.
        Raises UsageError (empty, id outside the vocabulary, longer than the context) and Interrupted when cancelled;
        the timeline then holds the part of `ids` that was computed.
        """
        self.engine.check_ids(ids)
        self._go_back(ids)
        self.reused = self.position
        if self.position < len(ids):
            self.mark()  # what comes may be taken back
        places = {len(ids), *marks}
        for chunk in self._chunks(ids, places):
            if cancel is not None and cancel():
                raise Interrupted(f"Stopped after {self.position} of {len(ids)} prompt tokens.")
            self._advance(chunk)
            if self.position in places:
                self.mark()
            if progress is not None:
                progress(self.position - self.reused, len(ids) - self.reused)
        return self.logits

    def step(self, token: int) -> Tensor:
        """Extends the timeline by one token and returns its logits [vocab], float32."""
        self.engine.check_ids([token], after=self.position)
        self._advance([token])
        return self.logits

    @property
    def logits(self) -> Tensor:
        """Logits [vocab], float32, of the timeline's last token."""
        if self._logits is None:
            raise UsageError("This session is empty, so there is nothing to predict from.", "Sync a prompt first.")
        return self._logits

    def mark(self) -> None:
        """Puts a snapshot of this place on the shelf; where there is no memory for one, the session does without."""
        if self.position and not self._shelf.holds(self.position):
            with suppress(torch.OutOfMemoryError):
                self._shelf.put(Mark(self.position, self._state.snapshot(), self.logits))

    def clear(self) -> None:
        """Back to an empty timeline."""
        self._shelf.clear()
        self._return_to(None)

    def save(self, path: str | Path) -> None:
        """Writes ids, state and logits to `path` (safetensors), at once or not at all."""
        saved = sessionfile.Saved(tuple(self.ids), self.logits.cpu(), self._state.snapshot().tensors())
        sessionfile.write(Path(path), saved, self.engine.fingerprint, self.engine.name)

    def load(self, path: str | Path) -> None:
        """Continues the timeline that was saved in `path`; the next logits are bitwise those of the saved session.

        Raises CorruptError (damaged file) or UsageError (another model, longer than the context); the session is then
        as it was before.
        """
        saved = sessionfile.read(Path(path), self.engine.fingerprint, self.engine.name)
        self.engine.check_ids(saved.ids)
        state = self.engine.model.new_state(self.engine.ctx)
        state.restore(Snapshot.from_tensors(len(saved.ids), saved.state))
        self._shelf.clear()
        self._state, self.ids, self._logits = state, list(saved.ids), saved.logits
        self.mark()

    def _advance(self, chunk: Sequence[int]) -> None:
        wanted = [*self.ids, *chunk]
        short = self._forward(chunk)
        if short is None:
            return
        self._return_to(self._shelf.newest())
        if not self._shrink(len(chunk)):
            raise CapacityError(f"The device has no memory left: {short}.",
                                "Choose a smaller --ctx, or close other programs that use it.")
        for part in self._chunks(wanted, {len(wanted)}):
            self._advance(part)

    def _forward(self, chunk: Sequence[int]) -> str | None:
        """Computes the chunk; what a device says that has no memory for it. Whoever tries again does so when this has returned,
        for until then the failure holds what the unfinished layers had made."""
        try:
            self._logits = self.engine.model.forward(torch.tensor(chunk), self._state)[-1]
            self.ids.extend(chunk)
            if self.engine.hot is not None:
                self.engine.hot.observe()
        except torch.OutOfMemoryError as failure:
            return str(failure).partition(". ")[0]
        except BaseException:  # it may come between two layers, when the state is neither old nor new
            self._return_to(self._shelf.newest())
            raise
        return None

    def _shrink(self, failed: int) -> bool:
        """After `failed` tokens for which there was no memory: computes fewer at once, which makes prompts slower, or else gives
        slots of experts back, which makes everything slower. False where neither is left."""
        if failed > LEAST_CHUNK:
            self._chunk = max(LEAST_CHUNK, failed // 2)
            return True
        return self.engine.hot is not None and self.engine.hot.shrink()

    def _chunks(self, ids: Sequence[int], places: set[int]) -> Iterator[Sequence[int]]:
        """Cuts what the timeline lacks of `ids` into pieces that end at each of `places`, the end among them; each must be
        computed before the next is asked for."""
        while (start := self.position) < len(ids):
            yield ids[start:min(start + self._chunk, *(place for place in places if place > start))]

    def _go_back(self, ids: Sequence[int]) -> None:
        """Leaves of the timeline what `ids` begins with: all of it, or as much as the nearest snapshot holds."""
        shared = _common_prefix(self.ids, ids)
        if shared < self.position:
            self._shelf.forget_after(shared)
            self._return_to(self._shelf.newest())

    def _return_to(self, mark: Mark | None) -> None:
        if mark is None:
            self._state, self._logits = self.engine.model.new_state(self.engine.ctx), None
        else:
            self._state.restore(mark.snapshot)
            self._logits = mark.logits
        del self.ids[mark.position if mark else 0:]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
