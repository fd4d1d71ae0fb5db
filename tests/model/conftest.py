"""Every model test runs with poisoned memory: a slot of the state that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv4_kernels import alloc


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    alloc.poison(True)
    yield
    alloc.poison(False)
