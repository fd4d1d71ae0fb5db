"""A CUDA graph's stand-in where no card is: writes down every launch of a run and computes them again, with the same memory.

As on a card, what is repeated are launches with the arguments that they had: the interpreter's of Triton kernels, and torch's
operations, whose results go to where they went. Whatever else the host decided or read meanwhile is not decided again, so a
replay is right only if nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.launches import interpreted_launches

READ_BY_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class _Launches(TorchDispatchMode):
    """Computes as usual and writes down how to compute it again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.silent = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        name, options = func._schema.name, dict(kwargs or {})
        if not self.silent and name in READ_BY_HOST:
            raise RuntimeError(f"{name} waits for the device")
        given = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        made = func(*args, **options)
        if not self.silent:
            self._note(func, args, options, made, given)
        return made

    def _note(self, func: Any, args: Sequence[Any], options: dict[str, Any], made: Any, given: list[Tensor]) -> None:
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        fresh = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)
                 and leaf.untyped_storage().data_ptr() not in known]
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, options))
        if func._schema.is_mutable:
            self.steps.append(lambda: _again(func, *held))
        elif fresh and "empty" not in func._schema.name:
            self.steps.append(lambda: _into(fresh, _again(func, *held)))
        else:
            self.steps.append(lambda: held and None)  # views and memory without contents: kept, so that addresses stay taken


def _again(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    return func(*args, **options)


def _into(places: Sequence[Tensor], made: Any) -> None:
    for place, value in zip(places, (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)), strict=True):
        place.copy_(value)


class Replay:
    """A run that can be repeated. Unlike a graph it is computed when it is recorded, so the first replay only hands that out."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        mode = _Launches()
        with interpreted_launches(mode, lambda kernel, again: mode.steps.append(again)):
            self._out = compute()
        self._steps, self._computed = mode.steps, True
        self.replayed = 0

    def replay(self) -> Tensor:
        if not self._computed:
            self.replayed += 1
            with torch.inference_mode():
                for step in self._steps:
                    step()
        self._computed = False
        return self._out
