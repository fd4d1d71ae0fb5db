"""A GGUF gives the logits of the checkpoint that it was written from: all of them, or what its types can hold of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_quant.files import open_source
from dsv4cli.model.transformer import Model
from tests.support.gguf_writer import (
    Choice,
    Kind,
    as_converted,
    as_ds4_in_four_bits,
    as_ds4_in_two_bits,
    ds4_keys,
    quantised_as,
    write,
)
from tests.support.synth import Checkpoint, Shape
from tests.support.tolerance import CHUNKS, RELATIVE, assert_close


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("expand_limit", [0, 1 << 40])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_lossless_types_give_the_same_logits(kind: Kind, expand_limit: int, checkpoint: Path, ids: Tensor,
                                             tmp_path: Path) -> None:
    """FP8 and FP4 codes times powers of two are exact in bf16, so nothing may change."""
    official = open_source(checkpoint)
    other = open_source(write(official, tmp_path / "model.gguf", kind))
    assert other.layout == "gguf"
    logits = []
    for source in (official, other):
        model = Model.bind(source, numerics="plain", expand_limit=expand_limit)
        logits.append(model.forward(ids[:60], model.new_state(60), logits="all"))
    assert_close(logits[1], logits[0], RELATIVE[torch.float32])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `checkpoint`, with rows that blocks of 256 fill."""
    return Checkpoint(Shape(width=256), seed=6).write(tmp_path_factory.mktemp("wide"))


PUBLISHED = {"llama.cpp": as_converted, "ds4-q4": as_ds4_in_four_bits, "ds4-q2": as_ds4_in_two_bits}


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("choice", PUBLISHED.values(), ids=PUBLISHED)
def test_published_types_and_keys(choice: Choice, wide: Path, ids: Tensor, tmp_path: Path) -> None:
    """A file's logits are those of its decoded weights in float32. (What the types cost is measured on the embedded model.)"""
    official = open_source(wide)
    change = ds4_keys(official.config) if choice is not as_converted else lambda keys: None
    theirs = open_source(write(official, tmp_path / "theirs.gguf", choice, change_keys=change))
    decoded = open_source(write(theirs, tmp_path / "decoded.gguf", quantised_as(Kind.F32)))
    logits = []
    for source in (theirs, decoded):
        model = Model.bind(source, numerics="plain", expand_limit=0)
        logits.append(model.forward(ids[:60], model.new_state(60), logits="all"))
    assert_close(logits[0], logits[1], CHUNKS)
