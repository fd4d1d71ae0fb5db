"""What to change so that a model fits, or stays in faster memory: sentences with numbers. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from dsv4_quant import schema
from dsv4_quant.files.gguf_writer import row_bytes
from dsv4_quant.files.headers import Header
from dsv4_quant.recipe import KEEP, RECIPES, Recipe, layer_of, slot_of
from dsv4cli.console import in_bytes
from dsv4cli.engine.cards import UNREAD
from dsv4cli.engine.memory import SMALLEST_CONTEXT, MemoryPlan
from dsv4cli.errors import CapacityError

Replan = Callable[[int], MemoryPlan]  # the same plan for another context


def to_run(header: Header, made: MemoryPlan, replan: Replan) -> str:
    """For a plan that does not run: the longest context, halving, that would; else which requantised form would, or what is
    missing, and whether the CPU alone has room."""
    tokens = made.context // 2
    while tokens >= SMALLEST_CONTEXT:
        if replan(tokens).runs:
            return f"--ctx {tokens} would fit."
        tokens //= 2
    short = [card for card in made.cards if not card.runs]
    if short:
        over = in_bytes(sum(card.fixed - (card.available or 0) for card in short))
        return f"No context is short enough: {over} of GPU memory are missing. Without a GPU (--device cpu) RAM counts alone."
    over = in_bytes(made.least - (made.available or 0))
    return f"No context is short enough: {over} have to go. {smaller(header, made) or 'Choose a machine with more memory.'}"


def demand_fit(header: Header, name: str, made: MemoryPlan, replan: Replan) -> None:
    """Raises what MemoryPlan.demand_fit does, with advice that has numbers."""
    try:
        made.demand_fit(name)
    except CapacityError as error:
        raise CapacityError(error.message, to_run(header, made, replan)) from None


def left_out(made: MemoryPlan, cards: int) -> list[str]:
    """For a plan that has no layer for some of so many cards: that they are of no use."""
    idle = cards - len(made.cards)
    many = f"{idle} of the {cards} GPUs have" if idle > 1 else f"1 of the {cards} GPUs has"
    return [f"{many} no layer: a layer needs more memory, or the model is too small to be dealt out."] if idle else []


def to_speed_up(header: Header, made: MemoryPlan) -> list[str]:
    """For a plan that runs with experts on the disk: what would keep all of them in memory."""
    if not made.on_disk:
        return []
    more = f"{in_bytes(made.on_disk)} more memory would keep every expert off the disk"
    return [f"{more}. {said}" if (said := smaller(header, made)) else f"{more}."]


def smaller(header: Header, made: MemoryPlan) -> str:
    """The largest recipe of `dsv4 quantize` after which all would stay in memory, with its size; "" if there is none."""
    stored = sum(info.nbytes for info in header.by_role()["routed_expert"])
    for recipe in RECIPES.values():
        saved = stored - expert_bytes(header, recipe)
        if saved > 0 and made.needed - saved <= (made.available or 0):
            kept = sum(info.nbytes for role, infos in header.by_role().items() if role not in UNREAD for info in infos)
            return f"dsv4 quantize --recipe {recipe.name} would make about {in_bytes(kept - saved)} of it, which fit."
    return ""


def expert_bytes(header: Header, recipe: Recipe) -> int:
    """Bytes of the routed experts as `recipe` would write them; exact, but for a type whose blocks do not fill a row."""
    total = 0
    for spec in schema.gguf_tensors(header.config):
        kind = recipe.type_of(slot_of(spec.name), layer_of(spec.name)) if spec.role == "routed_expert" else KEEP
        if kind != KEEP:
            total += spec.shape[0] * spec.shape[1] * row_bytes(kind, spec.shape[2])
    return total
