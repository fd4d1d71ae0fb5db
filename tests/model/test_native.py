"""The model on the CPU's own kernels, straight from the bytes of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_quant.files import open_source
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound
from tests.support.gguf_writer import Kind, write
from tests.support.synth import Checkpoint, Shape, transformers_logits
from tests.support.tolerance import CHUNKS, ORACLE, assert_close, relative_error

pytestmark = pytest.mark.skipif(backends.cpu_trouble() is not None, reason="no C++ compiler")

ROUNDED = 0.25  # what activations of 8 bits may do to the logits of a random model, whose layers amplify every error


def logits_of(model: Model, ids: Tensor) -> Tensor:
    return model.forward(ids, model.new_state(len(ids)), logits="all")


def test_every_operation_is_native() -> None:
    assert {op: backends.pick(op, "cpu").name for op in backends.OPERATIONS} == dict.fromkeys(backends.OPERATIONS, "cpu")


@pytest.mark.filterwarnings("default")  # theirs to mend
def test_a_float32_gguf_says_what_transformers_says(tmp_path: Path) -> None:
    """Read in place, and nothing is rounded."""
    checkpoint = Checkpoint(Shape(), 5)
    ids = torch.randint(0, Shape().vocab, (300,), generator=torch.Generator().manual_seed(5))
    source = open_source(write(open_source(checkpoint.write(tmp_path / "official")), tmp_path / "model.gguf", Kind.F32))
    model = Model.bind(source, numerics="plain", expand_limit=0)
    assert_close(logits_of(model, ids), transformers_logits(checkpoint, ids), ORACLE)


def test_plain_numerics_round_nothing(bound: Bound, ids: Tensor, request: pytest.FixtureRequest) -> None:
    """Packed in FP8 and FP4, and still what transformers computes."""
    fast = logits_of(bound(expand_limit=0), ids[:60])
    request.getfixturevalue("on_reference")
    assert_close(fast, logits_of(bound(expand_limit=0), ids[:60]), CHUNKS)


def test_official_numerics_stay_close_to_the_reference(bound: Bound, ids: Tensor, request: pytest.FixtureRequest) -> None:
    fast = logits_of(bound(numerics="official", expand_limit=0), ids[:60])
    request.getfixturevalue("on_reference")
    assert 0 < relative_error(fast, logits_of(bound(numerics="official", expand_limit=0), ids[:60])) < ROUNDED


@pytest.mark.parametrize("size", [1, 3, 128])
def test_packed_chunks_are_the_same_as_one(size: int, bound: Bound, ids: Tensor) -> None:
    model = bound(expand_limit=0)
    state = model.new_state(150)
    parts = [model.forward(chunk, state, logits="all") for chunk in ids[:150].split(size)]
    assert_close(torch.cat(parts), logits_of(model, ids[:150]), CHUNKS)
