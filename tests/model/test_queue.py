"""Decoding queues its kernels: Python describes the whole token, and then nothing may have been let go or touched too early."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_kernels import alloc, backends
from dsv4_kernels.native import queue
from dsv4cli.model.state import State
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound

pytestmark = pytest.mark.skipif(backends.cpu_trouble() is not None, reason="no C++ compiler")

PROMPT, TOKENS = 120, 14  # groups of 4 and of 128 become full on the way


class Watch(TorchDispatchMode):
    """Lists what torch does with the memory of kernels that are queued, other than looking at a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._places(args)
        made = op(*args, **kwargs or {})
        kept = alloc._here.held
        if kept is not None and "empty" not in str(op):
            known = {x.untyped_storage().data_ptr() for x in kept if isinstance(x, Tensor)}
            views = made if isinstance(made, (tuple, list)) else (made,)
            if before & known - self._places(views):  # a view has its place in common with what it is a view of
                self.touched.append(str(op))
        return made

    @staticmethod
    def _places(values: Any) -> set[int]:
        return {x.untyped_storage().data_ptr() for x in values if isinstance(x, Tensor)}


def decoded(model: Model, ids: Tensor) -> tuple[Tensor, State]:
    state = model.new_state(PROMPT + TOKENS)
    model.forward(ids[:PROMPT], state, logits="none")
    return torch.cat([model.forward(token, state) for token in ids[PROMPT:PROMPT + TOKENS].split(1)]), state


@pytest.mark.parametrize("expand_limit", [0, 10 ** 9])
@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_it_does_not_matter_when_kernels_run(numerics: str, expand_limit: int, bound: Bound, ids: Tensor,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    model = bound(numerics=numerics, expand_limit=expand_limit)
    found: dict[str, tuple[Tensor, State]] = {}
    ways: dict[str, Callable[..., AbstractContextManager[None]]] = {
        "soon": queue.queued, "at the end": partial(queue.queued, lazily=True)}
    for name, way in ways.items():
        monkeypatch.setattr(backends, "queued", way)
        found[name] = decoded(model, ids)
    backends.use_threads(1)  # at once
    found["at once"] = decoded(model, ids)
    backends.use_threads(2)
    expected, state = found.pop("at once")
    for logits, other in found.values():
        assert torch.equal(logits, expected)
        assert all(torch.equal(tensor, other.snapshot().contents[name])
                   for name, tensor in state.snapshot().contents.items())


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_torch_leaves_what_kernels_compute_alone(numerics: str, bound: Bound, ids: Tensor) -> None:
    alloc.poison(False)  # which is torch's doing
    backends.use_threads(2)
    model = bound(numerics=numerics, expand_limit=0)
    with Watch() as watch:
        decoded(model, ids)
    assert not watch.touched


def test_the_watch_sees_what_it_is_there_for() -> None:
    backends.use_threads(2)
    with Watch() as watch, backends.queued():
        made = alloc.empty((4,), torch.float32)
        made[:2].flatten().unsqueeze(0)
        assert not watch.touched
        made + 1
    assert watch.touched == ["aten.add.Tensor"]
