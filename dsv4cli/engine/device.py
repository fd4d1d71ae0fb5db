"""Where a model computes: on a card where one is asked for, or is there for `auto` once kernels are PROVEN; else on the CPU.

A card has to be one that our kernels can use. For `auto` the model has to fit into its memory; whoever asks for a card gets it as
long as everything but routed experts fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from dsv4_kernels import backends
from dsv4cli.console import in_bytes
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")
OLDEST = (8, 0)  # compute capability of NVIDIA's first cards whose tensor cores take bf16
PROVEN = False  # no kernel has run on a card yet, so a card is used where it is asked for, and not unasked
PLAIN_HINT = "Leave --device out, or use --device cpu."


class Place(NamedTuple):
    """A device, why it was chosen, and what the model will need there."""

    device: str  # "cpu" or "cuda"; torch calls AMD's cards cuda too
    reason: str
    plan: MemoryPlan


def demand_device(asked: str) -> None:
    """Raises UsageError for a device that does not exist, or is not here."""
    if asked not in DEVICES:
        raise UsageError(f"There is no device {asked!r}.", f"Choose {', '.join(DEVICES[:-1])} or {DEVICES[-1]}.")
    if asked == "cuda" and (trouble := card_trouble()) is not None:
        raise UsageError(f"Nothing can run on cuda: {trouble}.", PLAIN_HINT)


def settle(name: str, asked: str, formats: Collection[str], plan_for: Callable[[str], MemoryPlan]) -> Place:
    """The place for a model called `name` with matrices of these `formats`; plan_for("cpu") and plan_for("cuda") tell what it
    needs there.

    Raises UsageError as `demand_device` does and for formats that no kernel reads, CapacityError (both numbers) where the
    chosen device has too little memory.
    """
    demand_device(asked)
    reason = "it was asked for" if asked == "cpu" else card_trouble()
    if asked == "auto" and reason is None and not PROVEN:
        reason = "the kernels have not been proven on a card yet; --device cuda tries them"
    if reason is None:
        plan = plan_for("cuda")
        strange = [] if plan.expands else sorted(set(formats) - backends.gpu_formats())
        if strange and asked == "cuda":
            raise UsageError(f"{name} cannot run on cuda: there is no kernel for {', '.join(strange)}.", PLAIN_HINT)
        if asked == "cuda" or (plan.on_cards and not strange):
            plan.demand_fit(name)
            return Place("cuda", "it was asked for" if asked == "cuda" else "the model fits into the card's memory", plan)
        reason = (f"no kernel of the card's reads {', '.join(strange)}" if strange else
                  f"the model needs {_whole(plan)} of the card's memory, which has {_free(plan)} free")
    plan = plan_for("cpu")
    plan.demand_fit(name)
    return Place("cpu", reason, plan)


def _whole(plan: MemoryPlan) -> str:
    return in_bytes(sum(card.whole for card in plan.cards))


def _free(plan: MemoryPlan) -> str:
    return in_bytes(sum(card.available or 0 for card in plan.cards))


def card_trouble() -> str | None:
    """Why no model can run on a card here, without a full stop, or None when one can."""
    if not torch.cuda.is_available():
        return "torch finds no card" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
    if (missing := backends.gpu_trouble()) is not None:
        return missing.message.rstrip(".")
    found = torch.cuda.get_device_capability()
    if torch.version.hip is None and found < OLDEST:
        return f"the card's compute capability is {found[0]}.{found[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]}"
    return None


def free_on_cards(limits: Sequence[int] = ()) -> list[int]:
    """Bytes that cards have left for this process, torch's own unused ones among them, but at most their limits: of the first
    card, or of as many as there are limits.

    Raises UsageError for more limits than cards, and for a limit that is more than its card has.
    """
    if len(limits) > 1 and len(limits) > torch.cuda.device_count():
        raise UsageError(f"--vram names {len(limits)} GPUs, but there are {torch.cuda.device_count()}.",
                         "Give a size for each.")
    left = []
    for card in range(len(limits) or 1):
        free, installed = torch.cuda.mem_get_info(card)
        if limits and limits[card] > installed:
            raise UsageError(f"--vram asks for {in_bytes(limits[card])}, but the GPU has {in_bytes(installed)}.",
                             "Give less, or leave --vram out to use what is free.")
        free += torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
        left.append(min([free, *limits[card:card + 1]]))
    return left
