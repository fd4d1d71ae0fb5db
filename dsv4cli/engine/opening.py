"""What opening a model takes beside its weights: memory plan, tokenizer, sampling, a fingerprint for saved sessions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dsv4_kernels import backends
from dsv4_quant.files import Source
from dsv4_quant.files.mapping import advised_at_once
from dsv4cli.console import in_bytes
from dsv4cli.encoding.tokenizer import Tokenizer
from dsv4cli.engine import advice, machine
from dsv4cli.engine.cards import UNREAD
from dsv4cli.engine.device import Place, free_on_cards, settle
from dsv4cli.engine.memory import (
    LOADED_LATER,
    MemoryPlan,
    address_space,
    available_memory,
    plan_model,
    resident_bytes,
)
from dsv4cli.engine.rates import Foretold, foretell
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import CapacityError, CorruptError, UsageError
from dsv4cli.model.files import MappedFiles
from dsv4cli.model.slots import Room

RECOMMENDED = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty")  # keys of generation_config.json
WHOLE_NUMBERS = ("i8", "i16", "i32", "i64")  # tables, which are decoded when they are bound


def place_of(source: Source, name: str, ctx: int | None, numerics: str, device: str, vram: Sequence[int] = ()) -> Place:
    """Where `source` will compute, and what it will need there, told before its weights are read.

    vram: the most bytes to use of the card; `auto` is that card then. Raises UsageError for a context that the model does not
    have, a device that is not here and more `vram` than a card has, CapacityError (both numbers, and what would fit) for a
    context that the machine does not have."""
    refused: list[tuple[str, MemoryPlan]] = []

    def plan_for(where: str, tokens: int | None = ctx) -> MemoryPlan:
        _demand_addresses(source, name)
        cards = free_on_cards(vram) if where == "cuda" else []
        program, free = resident_bytes(), available_memory()
        available = None if free is None else free + program  # what this process holds already is in the plan
        plan = plan_model(source.header, name, ctx=tokens, numerics=numerics, available=available, cards=cards,
                          program=program + LOADED_LATER, decodes=backends.cpu_trouble() is not None)
        if not plan.expands and len(plan.cards) < len(cards):
            raise CapacityError(f"Of the {len(cards)} GPUs that --vram names, {len(plan.cards)} have room for a layer of {name}.",
                                "Leave the smaller ones out.")
        if not plan.runs:
            refused.append((where, plan))
        return plan

    try:
        return settle(name, "cuda" if vram and device == "auto" else device, _formats(source), plan_for)
    except CapacityError:
        if not refused:
            raise
        where, plan = refused[-1]  # where it was to run at last
        advice.demand_fit(source.header, name, plan, lambda tokens: plan_for(where, tokens))
        raise


def _demand_addresses(source: Source, name: str) -> None:
    """Raises CapacityError where the process may not map all files, however much memory there is."""
    left, wanted = address_space(), sum(file.stat().st_size for file in source.header.files())
    if left is not None and left < wanted:
        raise CapacityError(f"The files of {name} are {in_bytes(wanted)}, but this process may map only {in_bytes(left)} more.",
                            "Raise the limit of its address space (ulimit -v unlimited).")


def read_ahead(source: Source, plan: MemoryPlan) -> None:
    """Has experts read ahead from now on if not all of them fit into memory. (Where they do, asking costs more than it gains.)"""
    if plan.on_disk:
        backends.ask_ahead(min(advised_at_once(file) for file in source.header.files()))


def rooms_of(place: Place) -> tuple[Room, ...]:
    """Slots for routed experts on the cards; none where all weights lie in one place."""
    plan = place.plan
    if plan.expands or (plan.on_cards and len(plan.cards) == 1):
        return ()
    names = [place.device] if len(plan.cards) == 1 else [f"{place.device}:{number}" for number in range(len(plan.cards))]
    return tuple(Room(name, card.first, card.last, card.slots) for name, card in zip(names, plan.cards, strict=True))


def rate_at(source: Source, place: Place, numerics: str, threads: int | None) -> Foretold:
    """How fast the model will decode here, by what this machine was measured to do with all its cores."""
    if backends.cpu_trouble() is not None:
        return Foretold.nothing("the CPU's own kernels cannot run here")
    if threads not in (None, backends.most_threads()):
        return Foretold.nothing(f"the machine is measured with all its {backends.most_threads()} cores")
    return foretell(source.header, place.plan, numerics, machine.load())


def _formats(source: Source) -> set[str]:
    """Of the matrices that the trunk reads, where they vary: official checkpoints have those that every kernel knows."""
    if source.header.layout == "official":
        return set()
    roles = source.header.by_role().items()
    return {info.dtype for role, infos in roles if role not in UNREAD
            for info in infos if len(info.shape) > 1 and info.dtype not in WHOLE_NUMBERS}


def tokenizer_of(source: Source, name: str) -> Tokenizer:
    """Raises CorruptError when the model has none, or one that is larger than its vocabulary."""
    found = source.tokenizer()
    if found is None:
        raise CorruptError(f"{name} has no tokenizer.", "Put the tokenizer.json of its checkpoint beside the weights.")
    tokenizer = Tokenizer.from_dict(found) if isinstance(found, dict) else Tokenizer.from_file(found)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise CorruptError(f"The tokenizer of {name} has {tokenizer.vocab_size} ids, but the model only "
                           f"{source.config.vocab_size}.", "Use the tokenizer.json that belongs to the checkpoint.")
    return tokenizer


def sampling_of(source: Source) -> Sampling:
    """What the model's authors recommend in generation_config.json; Sampling's own defaults where they say nothing.

    Raises CorruptError for a file that cannot be read or values that cannot be meant.
    """
    path = source.path / "generation_config.json"
    if not path.is_file():
        return Sampling()
    hint = "Take the generation_config.json that belongs to the checkpoint, or remove it."
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        values = {name: said[name] for name in RECOMMENDED if said.get(name) is not None}
        return Sampling(**values if said.get("do_sample", True) else {"temperature": 0})
    except UsageError as error:
        raise CorruptError(f"{path}: {error.message}", hint) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read: {error}.", hint) from error


def fingerprint_of(source: Source, numerics: str) -> str:
    """SHA-256 over what a state depends on: configuration, numerics, and of the weights their size and the last norm.

    No two trainings share that norm, and no two quantisations the size; reading all weights would take minutes.
    """
    facts = json.dumps([source.raw_config, numerics, source.tensor_bytes], sort_keys=True, default=str)
    digest, files = hashlib.sha256(facts.encode()), MappedFiles(source)
    digest.update(source.read("norm.weight").float().contiguous().numpy().data)
    files.demand_unchanged()
    return digest.hexdigest()
