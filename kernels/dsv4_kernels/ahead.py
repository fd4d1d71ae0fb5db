"""Ways in which Triton kernels are compiled ahead of time, to watch their registers where no card is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from dsv4_kernels.backends import OPERATIONS


class Case(NamedTuple):
    """A kernel with the sizes of one real use. Each `gpu.py` has a tuple of them, AHEAD, and each kernel in it at least one.

    types: of the arguments that are no constants, in their order, as Triton spells them ("*fp32 *u8 i32 fp32"); behind a
    whole number may stand what it is a multiple of ("i32:16"). Pointers are multiples of 16 bytes, as torch's are.
    """

    kernel: Any  # triton.JITFunction
    types: str
    constants: Mapping[str, Any] = {}
    warps: int = 4
    stages: int = 2

    @property
    def name(self) -> str:
        """What tells the cases of one kernel apart: its name and constants."""
        constants = ",".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{constants}]"

    def signature(self) -> dict[str, str]:
        """Argument -> type, as ASTSource takes it. Raises ValueError when the numbers of arguments and types differ."""
        types = iter(self.types.split())
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        found = dict(zip(names, (kind.partition(":")[0] for kind in types), strict=True))
        return {name: found.get(name, "constexpr") for name in self.kernel.arg_names}

    def multiples(self) -> dict[tuple[int], list[list[Any]]]:
        """Place of an argument -> what it is a multiple of, as ASTSource takes it."""
        kinds = iter(self.types.split())
        found: dict[tuple[int], list[list[Any]]] = {}
        for place, name in enumerate(self.kernel.arg_names):
            kind = "constexpr" if name in self.constants else next(kinds)
            multiple = 16 if kind.startswith("*") else int(kind.partition(":")[2] or 1)
            if multiple > 1:
                found[place,] = [["tt.divisibility", multiple]]
        return found


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
