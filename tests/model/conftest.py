"""Every model test runs with poisoned memory: a slot of the state that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_quant.files import open_source
from dsv4cli.model.transformer import Model
from tests.support.synth import Checkpoint, Shape

Bound = Callable[..., Model]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    alloc.poison(True)
    yield
    alloc.poison(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with every kind of layer: window, both compressors, hash and learned routing."""
    return Checkpoint(Shape(stages=1, shards=2), seed=5).write(tmp_path_factory.mktemp("synth"))


@pytest.fixture
def bound(checkpoint: Path) -> Bound:
    """Binds that model; keywords go to Model.bind, whose numerics are plain here unless they are named."""
    return lambda numerics="plain", **options: Model.bind(open_source(checkpoint), numerics=numerics, **options)


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(0, Shape().vocab, (400,), generator=torch.Generator().manual_seed(5))
