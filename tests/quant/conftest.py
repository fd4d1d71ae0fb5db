"""Small checkpoints of random weights; what they hold is known from tests/support/synth.py, which knows nothing of dsv4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conversion import written
from tests.support.synth import Checkpoint, Shape

SMALL = Shape(ratios=(0, 4, 128), hidden=128, width=64, experts=3, vocab=64, index_heads=4, stages=1)


@pytest.fixture(scope="session")
def small() -> Checkpoint:
    """Three layers, one of each ratio, the first with hash routing; one MTP block."""
    return Checkpoint(SMALL, seed=3)


@pytest.fixture(scope="session")
def folder(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint as a GGUF, by the recipe mxfp4."""
    return written(folder, tmp_path_factory.mktemp("made") / "small.gguf")
