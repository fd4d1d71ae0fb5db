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


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_packed_weights_stay_close_to_the_reference(numerics: str, bound: Bound, ids: Tensor,
                                                    request: pytest.FixtureRequest) -> None:
    ids = ids[:60]
    fast = logits_of(bound(numerics=numerics, expand_limit=0), ids)
    request.getfixturevalue("on_reference")
    exact = logits_of(bound(numerics=numerics, expand_limit=0), ids)
    assert 0 < relative_error(fast, exact) < ROUNDED


def test_packed_chunks_are_the_same_as_one(bound: Bound, ids: Tensor) -> None:
    model = bound(expand_limit=0)
    whole = logits_of(model, ids[:150])
    for size in (1, 3, 128):
        state = model.new_state(150)
        parts = [model.forward(chunk, state, logits="all") for chunk in ids[:150].split(size)]
        assert_close(torch.cat(parts), whole, CHUNKS)
