"""Every kernel test runs with poisoned memory: what a kernel forgets to write is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv4_kernels import alloc, backends


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    alloc.poison(True)
    yield
    alloc.poison(False)


@pytest.fixture(autouse=True)
def reference_only(request: pytest.FixtureRequest) -> None:
    """Tests of the maths run on `ref`; those of the CPU's own kernels are in files called test_*_native.py, those of the
    Triton kernels in test_*_gpu.py."""
    if request.path.stem.endswith("_gpu"):
        request.getfixturevalue("on_triton")
    elif not request.path.stem.endswith(("_native", "_backends")):
        request.getfixturevalue("on_reference")


@pytest.fixture
def on_triton() -> Iterator[None]:
    """Doors give CPU tensors to `gpu` wherever it exists, which Triton's interpreter computes (interpreter.py)."""
    with backends.interpreted():
        yield


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(20)
