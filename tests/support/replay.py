"""A CUDA graph's stand-in where no card is: writes down every launch of a run and computes them later, with the same memory.

As on a card, nothing is computed while it is written down, and what is repeated are launches with the arguments that they had:
the interpreter's of Triton kernels, and torch's operations, whose results go to where they went. Whatever else the host decided
or read meanwhile is not decided again, so a replay is right only if nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.launches import interpreted_launches

READ_BY_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class _Launches(TorchDispatchMode):
    """Writes down how to compute everything."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.silent = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        name, options = func._schema.name, dict(kwargs or {})
        if self.silent:
            return func(*args, **options)
        if name in READ_BY_HOST:
            raise RuntimeError(f"{name} waits for the device")
        held = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, options))
        if func._schema.is_mutable:
            self.steps.append(lambda: _again(func, *held))
            return options["out"] if "out" in options else args[0]
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)}
        made = func(*args, **options)
        fresh = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)
                 and leaf.untyped_storage().data_ptr() not in given]
        if fresh and "empty" not in name:
            for leaf in fresh:
                _spoil(leaf)
            self.steps.append(lambda: _into(fresh, _again(func, *held)))
        else:
            self.steps.append(lambda: held and None)  # views and memory without contents: kept, so that addresses stay taken
        return made


def _spoil(made: Tensor) -> None:
    """What was computed now, of memory that nobody has filled yet, must not be of use to anybody."""
    if made.is_floating_point() or made.is_complex():
        made.fill_(torch.nan)
    elif made.dtype != torch.bool:
        made.zero_()


def _again(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    return func(*args, **options)


def _into(places: Sequence[Tensor], made: Any) -> None:
    for place, value in zip(places, (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)), strict=True):
        place.copy_(value)


class Replay:
    """A piece that can be repeated (dsv4cli.model.recording.Piece)."""

    def __init__(self) -> None:
        self._mode, self._within = _Launches(), ExitStack()
        self.replayed = 0

    def begin(self) -> None:
        steps = self._mode.steps
        self._within.enter_context(interpreted_launches(self._mode, lambda kernel, again: steps.append(again), computes=False))

    def end(self) -> None:
        self._within.close()

    def abandon(self) -> None:
        self.end()

    def replay(self) -> None:
        self.replayed += 1
        with torch.inference_mode():
            for step in self._mode.steps:
                step()
