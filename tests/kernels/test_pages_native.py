"""Experts whose bytes are still on the disk: they are asked for before they are touched, and nothing else changes."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.moe import Expert, Experts, routed_experts
from dsv4_quant.files.mapping import LEAST_ADVISED, MOST_ADVISED, advised_at_once
from dsv4_quant.formats import Packed
from tests.kernels.native import kernels  # noqa: F401

HIDDEN, WIDTH, COUNT = 1024, 512, 24
ROW = 34  # bytes of 32 weights in q8_0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads counters of Linux's")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts behind one another, q8_0: 1.7 MB each."""
    numbers = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (COUNT * 3 * HIDDEN * WIDTH // 32, ROW), dtype=torch.uint8, generator=numbers)
    blocks[:, :2] = torch.tensor([2.0**-11]).half().view(torch.uint8)
    path = tmp_path_factory.mktemp("experts") / "experts"
    path.write_bytes(blocks.numpy().tobytes())
    os.sync()
    return path


@pytest.fixture(autouse=True)
def not_asked_afterwards(kernels: str) -> Iterator[None]:  # noqa: F811
    yield
    backends.ask_ahead(0)


def computed(file: Path, at_once: int, tokens: int) -> tuple[Tensor, int]:
    """Some tokens' experts, read from the disk; and how often somebody had to wait for it. (The map reads single pages, so
    that how much a disk reads around them does not matter.)"""
    import resource

    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    pages.madvise(mmap.MADV_RANDOM)
    mapped = torch.frombuffer(pages, dtype=torch.uint8).view(COUNT, 3, -1)
    shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    experts = Experts(Expert(*(Packed("q8_0", shape, part.view(shape[0], -1)) for part, shape in zip(parts, shapes, strict=True)))
                      for parts in mapped)
    numbers = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, HIDDEN, generator=numbers)
    chosen = torch.stack([torch.randperm(COUNT, generator=numbers)[:4] for _ in range(tokens)])
    backends.ask_ahead(at_once)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found = routed_experts(x, torch.full((tokens, 4), 0.25), chosen, experts, 10.0, backend="cpu")
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before


@pytest.mark.parametrize("tokens", [1, 30])  # few experts, and more than are asked for at once
def test_what_is_asked_for_is_not_waited_for(file: Path, tokens: int) -> None:
    plain, waits = computed(file, 0, tokens)
    if waits < 1000:
        pytest.skip("this file system's files do not leave memory")
    asked, fewer = computed(file, LEAST_ADVISED, tokens)
    assert torch.equal(asked, plain)
    assert fewer < waits / 10  # some come while their page is on its way


def test_a_request_is_of_a_length_that_is_heard(file: Path) -> None:
    at_once = advised_at_once(file)
    assert LEAST_ADVISED <= at_once <= MOST_ADVISED
    assert at_once % 65_536 == 0
