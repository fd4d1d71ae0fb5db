from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_quant import schema
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import Source, open_source
from dsv4_quant.formats import Packed
from dsv4cli.errors import UsageError
from dsv4cli.model.state import State
from dsv4cli.model.transformer import Model
from dsv4cli.model.weights import bind
from tests.model.conftest import Bound
from tests.support.synth import Checkpoint, Shape


class Listening:
    """A source that notes what is read, and may change it on the way."""

    def __init__(self, source: Source, change: Callable[[str, Packed], Packed] = lambda _, packed: packed) -> None:
        self.source, self.change, self.read_names = source, change, list[str]()

    def read(self, name: str) -> Packed:
        self.read_names.append(name)
        return self.change(name, self.source.read(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def test_every_trunk_tensor_is_read_once_and_no_other(checkpoint: Path) -> None:
    source = Listening(open_source(checkpoint))
    bind(source, 0)
    trunk = [spec.name for spec in schema.tensors(source.config, schema.Variant()) if spec.stage is None]
    assert sorted(source.read_names) == sorted(name for name in trunk if not name.endswith(".scale"))


def test_a_wrong_shape_stops_with_its_name(checkpoint: Path) -> None:
    def cut(name: str, packed: Packed) -> Packed:
        return replace(packed, shape=(128, 255)) if name == "layers.1.attn.wq_a.weight" else packed

    with pytest.raises(CorruptFile, match=r"layers\.1\.attn\.wq_a\.weight .* \[128, 255\], but .* \[128, 256\]"):
        bind(Listening(open_source(checkpoint), cut), 0)


@pytest.mark.parametrize("number", [-1, Shape().experts])
def test_a_table_with_a_stranger_stops_with_its_name(checkpoint: Path, number: int) -> None:
    def spoil(name: str, packed: Packed) -> Packed:
        if not name.endswith("tid2eid"):
            return packed
        data = packed.data.clone()
        data[7, 1] = number
        return replace(packed, data=data)

    with pytest.raises(CorruptFile, match=rf"layers\.0\.ffn\.gate\.tid2eid .* names expert {number} of {Shape().experts}"):
        bind(Listening(open_source(checkpoint), spoil), 0)


@pytest.mark.usefixtures("on_reference")
def test_packed_and_expanded_weights_say_the_same(bound: Bound, ids: Tensor) -> None:
    packed, expanded = bound(expand_limit=0), bound()
    assert isinstance(packed.weights.layers[0].moe.experts[0].w1, Packed)
    assert isinstance(expanded.weights.layers[0].moe.experts[0].w1, Tensor)
    logits = [model.forward(ids[:30], model.new_state(30), logits="all") for model in (packed, expanded)]
    assert torch.equal(*logits)


def test_bytes_are_those_that_are_held(checkpoint: Path, bound: Bound) -> None:
    expanded = bound()
    assert expanded.weight_bytes >= 4 * (expanded.weights.values - Shape().vocab * Shape().chosen)  # int64 tables come on top
    stored = sum(spec.nbytes for spec in schema.tensors(expanded.config, schema.Variant()) if spec.stage is None)
    assert 0 <= bound(expand_limit=0).weight_bytes - stored < 0.05 * stored  # norms and the like became float32


def test_the_limit_is_in_bytes_of_float32(bound: Bound) -> None:
    values = bound().weights.values
    assert isinstance(bound(expand_limit=4 * values).weights.head, Tensor)
    assert isinstance(bound(expand_limit=4 * values - 1).weights.head, Packed)


def test_numerics_are_named(bound: Bound) -> None:
    assert bound("official").numerics.name == "official"
    for use in (lambda: bound("fast"), lambda: State.bytes_for(bound().config, 1, "fast")):
        with pytest.raises(UsageError, match="'fast'") as caught:
            use()
        assert "plain, official" in caught.value.hint


def test_a_drafting_stage_changes_nothing(ids: Tensor, tmp_path: Path) -> None:
    logits = []
    for stages in (0, 1):
        source = open_source(Checkpoint(Shape(ratios=(0, 4), stages=stages), seed=3).write(tmp_path / str(stages)))
        model = Model.bind(source, numerics="plain")
        logits.append(model.forward(ids[:20], model.new_state(20)))
    assert torch.equal(*logits)
