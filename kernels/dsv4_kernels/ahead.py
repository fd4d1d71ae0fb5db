"""Ways in which Triton kernels are compiled ahead of time, to watch their registers where no card is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeAlias

from dsv4_kernels.backends import OPERATIONS
from dsv4_kernels.tuned import AMD, sized

Kind: TypeAlias = "str | tuple[Kind, ...]"


class Case(NamedTuple):
    """A kernel with the sizes of one real use. Each `gpu.py` has a tuple of them, AHEAD, and each kernel in it at least one.

    types: of the arguments that are no constants, in their order, as Triton spells them ("*fp32 *u8 i32 fp32"); behind a
    whole number may stand what it is a multiple of ("i32:16"). Pointers are multiples of 16 bytes, as torch's are. A tuple is
    spelled with parentheses: "*fp32 ((*u8 i32) (*fp32 i32)) i32".
    """

    kernel: Any  # triton.JITFunction
    types: str
    constants: Mapping[str, Any] = {}
    warps: int = 4
    stages: int = 2
    sizes: str = ""  # a kernel of the table of tiles (tuned.py), whose warps and stages a target then has instead of these
    on_amd: Mapping[str, Any] = {}  # constants that are others there

    @property
    def name(self) -> str:
        """What tells the cases of one kernel apart: its name and constants."""
        constants = ",".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{constants}]"

    def on(self, target: str) -> Case:
        """The case as it is launched on a target, "sm_90" or "gfx942"."""
        constants = {**self.constants, **(self.on_amd if target.startswith(AMD) else {})}
        if not self.sizes:
            return self._replace(constants=constants)
        found = sized(self.sizes, target)
        return self._replace(constants=constants, warps=found["warps"], stages=found["stages"] or self.stages)

    def signature(self) -> dict[str, Any]:
        """Argument -> type, as ASTSource takes it. Raises ValueError when the numbers of arguments and types differ."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        found = dict(zip(names, (_bare(kind) for kind in _kinds(self.types)), strict=True))
        return {name: found.get(name, "constexpr") for name in self.kernel.arg_names}

    def multiples(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Place of an argument, or of what a tuple holds -> what it is a multiple of, as ASTSource takes it."""
        kinds = iter(_kinds(self.types))
        found: dict[tuple[int, ...], list[list[Any]]] = {}
        for place, name in enumerate(self.kernel.arg_names):
            for path, kind in () if name in self.constants else _leaves(next(kinds), (place,)):
                multiple = 16 if kind.startswith("*") else int(kind.partition(":")[2] or 1)
                if multiple > 1:
                    found[path] = [["tt.divisibility", multiple]]
        return found


def _kinds(types: str) -> list[Kind]:
    open_ones: list[list[Kind]] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", types):
        if word == "(":
            open_ones.append([])
        elif word == ")":
            whole = tuple(open_ones.pop())
            open_ones[-1].append(whole)
        else:
            open_ones[-1].append(word)
    return open_ones[0]


def _bare(kind: Kind) -> Kind:
    """Without what it is a multiple of."""
    return kind.partition(":")[0] if isinstance(kind, str) else tuple(_bare(part) for part in kind)


def _leaves(kind: Kind, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(kind, str):
        yield path, kind
        return
    for place, part in enumerate(kind):
        yield from _leaves(part, (*path, place))


def cases() -> dict[str, Case]:
    """Every case of every operation's `gpu.py`, by "operation.kernel[constants]". Triton must be there."""
    found: dict[str, Case] = {}
    for op in OPERATIONS:
        if find_spec(f"{__package__}.{op}.gpu") is not None:
            for case in import_module(f"{__package__}.{op}.gpu").AHEAD:
                name = f"{op}.{case.name}"
                if name in found:
                    raise ValueError(f"two cases are called {name}")
                found[name] = case
    return found
