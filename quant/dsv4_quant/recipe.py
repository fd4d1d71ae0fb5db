"""Which type each tensor gets: a recipe by role, and changes to it, for all layers or some.

Bits go to the dense tensors first: with experts kept exact, squeezing everything else costs as much as taking the experts
to three bits. So every recipe keeps attention and shared experts at Q8_0 and differs in the routed experts, which are
19 of 20 bytes. What is small (norms, mixers, router, compressors) stays as the checkpoint has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from dsv4_quant.errors import WrongUse
from dsv4_quant.files.gguf_writer import BLOCKS

KEEP = "keep"
# Types that are written, from the largest to the smallest.
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "mxfp4", "q3_k", "iq3_xxs", "q2_k", "iq2_xs", "iq2_xxs",
         "iq1_m")  # fmt: skip
UNWEIGHED = ("f32", "f16", "bf16", "q8_0")  # to write these, nobody asks how much a column matters
# What can be given a type of its own, and what a change to it means.
ROLES = {
    "experts": ("gate_up", "down"), "down": ("down",), "attention": ("attention",), "shared": ("shared",),
    "output": ("output",), "embed": ("embed",), "indexer": ("indexer",),
}  # fmt: skip
SLOTS = {
    "token_embd": "embed", "output": "output", "ffn_gate_exps": "gate_up", "ffn_up_exps": "gate_up", "ffn_down_exps": "down",
    "attn_q_a": "attention", "attn_q_b": "attention", "attn_kv": "attention", "attn_output_a": "attention",
    "attn_output_b": "attention", "ffn_gate_shexp": "shared", "ffn_up_shexp": "shared", "ffn_down_shexp": "shared",
    "indexer.attn_q_b": "indexer", "nextn.eh_proj": "attention", "fc": "attention",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """`type` for a slot, in the layers `first` .. `last`, or everywhere."""

    slot: str
    type: str
    first: int = 0
    last: int | None = None

    def holds(self, slot: str, layer: int | None) -> bool:
        if slot != self.slot:
            return False
        return self.last is None or (layer is not None and self.first <= layer <= self.last)


@dataclass(frozen=True)
class Recipe:
    """Rules, of which the last that holds decides."""

    name: str
    rules: tuple[Rule, ...]

    def type_of(self, slot: str, layer: int | None) -> str:
        """A type's name, or KEEP."""
        found = [rule.type for rule in self.rules if rule.holds(slot, layer)]
        return found[-1] if found else KEEP

    def changed(self, rules: Iterable[Rule]) -> Recipe:
        return replace(self, rules=(*self.rules, *rules))


def _recipe(name: str, gate_up: str, down: str, embed: str) -> Recipe:
    types = {"gate_up": gate_up, "down": down, "embed": embed}
    dense = dict.fromkeys(("attention", "shared", "output", "indexer"), "q8_0")
    return Recipe(name, tuple(Rule(slot, kind) for slot, kind in (dense | types).items()))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("mxfp4", "mxfp4", "mxfp4", KEEP),
        _recipe("q4", "q4_k", "q4_k", "q8_0"),
        _recipe("q3", "iq3_xxs", "q3_k", "q8_0"),
        _recipe("q2", "iq2_xxs", "q2_k", "q8_0"),
        _recipe("q1", "iq1_m", "iq2_xxs", "q8_0"),
    )
}


def named(name: str) -> Recipe:
    """Raises WrongUse for a name that is no recipe."""
    if name.lower() not in RECIPES:
        raise WrongUse(f"There is no recipe called {name}.", nearest(name, RECIPES))
    return RECIPES[name.lower()]


def slot_of(tensor: str) -> str:
    """What a GGUF tensor is to a recipe; "rest" for what no recipe touches."""
    leaf = re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight")
    return SLOTS.get(leaf, "rest")


def layer_of(tensor: str) -> int | None:
    match = re.match(r"blk\.(\d+)\.", tensor)
    return int(match[1]) if match else None


def rules_of(changes: Mapping[str, str]) -> list[Rule]:
    """Rules from what was said about each role: "q4_k", "q4_k,0-3=q8_0" or "7=q6_k".

    Raises WrongUse for an unknown role or type, with the nearest names, and for layers that are no numbers. What is said of
    `experts` holds for `down` unless that says otherwise.
    """
    found = []
    for role in sorted(changes, key=lambda role: role != "experts"):
        if role not in ROLES:
            raise WrongUse(f"There is no role called {role}.", nearest(role, ROLES))
        for word in changes[role].split(","):
            found += [replace(_rule(role, word.strip()), slot=slot) for slot in ROLES[role]]
    return found


def _rule(role: str, word: str) -> Rule:
    layers, equals, name = word.rpartition("=")
    kind = type_called(name)
    if not equals:
        return Rule(role, kind)
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", layers.strip())
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise WrongUse(f"--{role} {word}: {layers!r} is no layer and no range of layers.", "Write 7=TYPE or 0-3=TYPE.")
    return Rule(role, kind, int(match[1]), int(match[2] or match[1]))


def type_called(name: str) -> str:
    """The type, however it is capitalised. Raises WrongUse with the nearest names."""
    kind = name.strip().lower()
    if kind not in (*TYPES, KEEP):
        raise WrongUse(f"There is no type called {name or repr(name)} to write.", nearest(name, TYPES))
    return kind


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint: the names most like `name`, or all of them."""
    names = list(known)
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"There are {', '.join(names)}."


def fitting(columns: int) -> Sequence[str]:
    """The types whose blocks fill a row of that many elements."""
    return [kind for kind in TYPES if columns % BLOCKS[kind][0] == 0]
