"""The Engine: opens a model, begins sessions, answers conversations. Nothing in it changes after opening, but for which experts
lie where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_kernels import backends
from dsv4_quant.files import Source, open_source
from dsv4cli.engine import opening, turn
from dsv4cli.engine.device import Place, demand_device
from dsv4cli.engine.hot import Counts, Hot, Pace, counts_path
from dsv4cli.engine.loaded import Loaded
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.engine.records import Token
from dsv4cli.engine.release import release_of
from dsv4cli.engine.sampling import Sampling
from dsv4cli.engine.session import Progress, Session
from dsv4cli.engine.stream import Cancel
from dsv4cli.errors import UsageError
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.transformer import Model
from dsv4cli.registry import catalog

ONE_THREAD = 128_000_000  # bytes of float32 weights; below it, one thread is the fastest


class Engine(Loaded):
    """A loaded model. `session()` begins a timeline over it, `chat()` answers a conversation."""

    @classmethod
    def open(cls, model: str | Path = "tiny", *, numerics: str = "official", device: str = "auto",
             vram: Sequence[int] = (), threads: int | None = None, ctx: int | None = None, release: str | None = None) -> Engine:
        """Opens a model by alias, checkpoint folder or .gguf path.

        device: "cpu", "cuda" (torch calls AMD's cards so too; of routed experts it holds as many as fit), or "auto": cuda where
        a card is and the model fits into its memory. vram: the most bytes to use of the card, which also asks for one. ctx None
        chooses the longest usual context that fits. threads hold for the whole process; None means one per physical core, but 1
        for a very small model. Raises UsageError (unknown name, bad value), CapacityError with both numbers before anything is
        loaded that does not fit, and what the reader raises for a damaged or unknown file.
        """
        numerics_named(numerics)
        demand_device(device)
        _demand_threads(threads)
        entry = catalog.resolve(str(model))
        source = open_source(entry.located())
        place = opening.place_of(source, entry.name, ctx, numerics, device, vram)
        use_threads(threads, place.plan)
        opening.read_ahead(source, place.plan)
        fingerprint = opening.fingerprint_of(source, numerics)
        model_there, hot = _bound(source, numerics, place, fingerprint)
        return cls(entry.name, model_there, opening.tokenizer_of(source, entry.name),
                   release_of(entry, source.metadata, release), place.plan, fingerprint, opening.sampling_of(source),
                   place.reason, hot, opening.rate_at(source, place, numerics, threads))

    def session(self) -> Session:
        """A new, empty timeline."""
        return Session(self)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, think: str = "high",
             tools: Sequence[dict[str, Any]] | None = None, sampling: Sampling | None = None,
             max_tokens: int | None = None, stop: Sequence[str] = (), think_budget: int | None = None,
             session: Session | None = None, cancel: Cancel | None = None,
             progress: Progress | None = None) -> Iterator[Token]:
        """Answers a conversation in OpenAI's message shape; yields one record per token, the last one with `finish`.

        think: off, low, high or max (or an alias of the API); tools: OpenAI's tool objects; sampling: None for what the
        model's authors recommend; stop: strings that end the answer. With a session, whatever the conversation shares
        with the session's timeline is not computed again. The other arguments are those of `stream.generate`. A bad
        request raises here, before the first record.
        """
        return turn.answer(self, [dict(message) for message in messages], session=session or self.session(),
                           think=think, tools=tools, sampling=sampling or self.sampling, max_tokens=max_tokens, stop=stop,
                           think_budget=think_budget, cancel=cancel, progress=progress)


def _bound(source: Source, numerics: str, place: Place, fingerprint: str) -> tuple[Model, Hot | None]:
    """The model in its place; and where a card has too few slots for all its experts, who decides which they are for."""
    rooms = opening.rooms_of(place)
    if not rooms:
        return Model.bind(source, numerics=numerics, device=place.device), None
    path = counts_path(fingerprint)
    counts, pace = Counts.load(path, source.config), Pace.of(source.config, place.plan.cards[0])
    model = Model.bind(source, numerics=numerics, rooms=rooms, wanted=counts.dealt(rooms, pace))
    return model, Hot(model.tiers, counts, pace, path) if model.tiers is not None else None


def _demand_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot compute anything.", "Choose --threads 1 or more.")


def use_threads(threads: int | None, plan: MemoryPlan) -> None:
    """Who computes gets the threads: our kernels where there are any, torch where not.

    A very small model's products are shorter than the wait for a second thread (seen: 85 tokens/s became 3).
    """
    small = 0 < plan.expanded < ONE_THREAD
    backends.use_threads(threads or (1 if small else None))
    if threads is not None and backends.cpu_trouble() is not None:
        torch.set_num_threads(threads)
    elif small or backends.cpu_trouble() is None:
        torch.set_num_threads(1)
