"""Every kernel test runs with poisoned memory: what a kernel forgets to write is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv4_kernels import alloc


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    alloc.poison(True)
    yield
    alloc.poison(False)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(20)
