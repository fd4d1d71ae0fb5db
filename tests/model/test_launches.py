"""How many launches a decoded token takes on a card, layer by layer. The ceilings may only come down; docs/gpu-products.md has
the same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.placement import LAUNCHES
from dsv4_kernels import alloc, backends
from dsv4_quant.files import open_source
from dsv4cli.model.block import Block
from dsv4cli.model.experts import Tiers
from dsv4cli.model.slots import Desk, Room
from dsv4cli.model.transformer import Model
from tests.kernels.interpreter import QUIET
from tests.support.launches import launches
from tests.support.synth import Checkpoint, Shape

pytest.importorskip("triton")
pytestmark = QUIET

# A layer of each kind, and an indexer that has to choose as soon as there are two entries.
SMALL = Shape(ratios=(0, 4, 128), experts=4, heads=2, index_heads=2, index_topk=1, vocab=64, rounds=2,
              hidden=128, width=64, q_rank=128, o_rank=32)
PROMPT = 10
PRODUCTS = {"hyper", "linear", "moe", "residual", "router"}
# Layers of no, 4 and 128 tokens to an entry: products, experts and streams; then everything.
OF_PRODUCTS = (10, 9, 9)  # the first has nobody before it who sums for it
IN_LAYERS = (13, 14, 12)
AROUND = (13, 11)  # before the first layer and after the last one; the first token also makes memory for id and position


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(SMALL, seed=5).write(tmp_path_factory.mktemp("synth"))


@pytest.fixture(scope="module")
def tokens(path: Path) -> list[list[list[str]]]:
    """Of one token that completes no group, and of one that completes a group of four: what each layer launched; last, what
    the rest of the model did."""
    alloc.poison(False)
    model = Model.bind(open_source(path), numerics="official", expand_limit=0)
    state = model.new_state(PROMPT + 2)
    model.forward(torch.arange(PROMPT), state)  # by the CPU's kernels, which are soon done
    with backends.interpreted(), pytest.MonkeyPatch.context() as patch:
        ordinary, entries = _layers(model, state, patch), state.layers[1].entries
        assert entries is not None
        entry = entries.store.rows[PROMPT // 4].zero_()
        full = _layers(model, state, patch)
        assert entry.any(), "no group was completed"
        return [ordinary, full]


def _layers(model: Model, state: Any, patch: pytest.MonkeyPatch) -> list[list[str]]:
    spans, layer = [], Block.__call__

    def watched(self: Block, *given: Any, **options: Any) -> Any:
        start = len(log)
        made = layer(self, *given, **options)
        spans.append((start, len(log)))
        return made

    with patch.context() as own, launches() as log:
        own.setattr(Block, "__call__", watched)
        own.setattr(Desk, "mark", lambda self: log.append("|"))
        own.setattr(Tiers, "answer", lambda self, limit: log.append("|"))  # without what the host computes
        model.forward(torch.tensor([1]), state)
    return [log[start:end] for start, end in spans] + [log[:spans[0][0]] + log[spans[-1][1]:]]


def _above(found: list[list[str]], ceiling: tuple[int, ...]) -> list[str]:
    return [f"{len(each)} instead of {most}: {' '.join(each)}" for each, most in zip(found, ceiling, strict=True)
            if len(each) > most]


def test_products_streams_and_experts(tokens: list[list[list[str]]]) -> None:
    for token in tokens:
        own = [[name for name in layer if name.partition(".")[0] in PRODUCTS] for layer in token[:3]]
        assert all(own), "nothing was launched at all"
        assert _above(own, OF_PRODUCTS) == []


def test_whole_layers(tokens: list[list[list[str]]]) -> None:
    assert "attention._attend" in tokens[0][0]
    assert "indexer._choose" in tokens[0][1]
    for token, around in zip(tokens, AROUND, strict=True):
        assert _above(token, (*IN_LAYERS, around)) == []


def test_a_layer_of_which_the_host_has_a_part(path: Path, tokens: list[list[list[str]]]) -> None:
    """Until the host is told, beside it, and behind its answer: what the simulation of placements assumes, of which no layer may
    have more. A layer that is whole on the card is like any other."""
    alloc.poison(False)
    numbers = range(SMALL.experts)
    model = Model.bind(open_source(path), numerics="official", expand_limit=0, rooms=[Room("cpu", 0, 3, 6)],
                       wanted=[*((2, number) for number in numbers), (0, 0), (1, 0)])
    state = model.new_state(PROMPT + 1)
    model.forward(torch.arange(PROMPT), state)
    with backends.interpreted(), pytest.MonkeyPatch.context() as patch:
        layers = _layers(model, state, patch)
    parts = [[kernels(part.split()) for part in " ".join(layer).split("|")] for layer in layers[:3]]
    whole = [kernels(layer) for layer in tokens[0][:3]]
    assert [len(part) for part in parts] == [3, 3, 1]
    assert "held._hidden_held" in parts[1][1]
    assert parts[2] == [whole[2]]
    for layer, ratio, first in zip(parts[:2], SMALL.ratios, (1, 0), strict=False):  # the first layer has one launch of its own
        expected = LAUNCHES[ratio]
        assert [len(part) for part in layer] == [expected.told + first, expected.beside, expected.behind]
    for layer, ratio, first in zip(whole, SMALL.ratios, (1, 0, 0), strict=True):
        assert len(layer) == LAUNCHES[ratio].whole + first
    assert len(kernels(tokens[1][1])) == len(whole[1]), "a group of four is completed by no launch of its own"


def kernels(log: list[str]) -> list[str]:
    """What a layer launches for each token: operations of torch find out about positions, for all layers, or make tables once."""
    return [name for name in log if not name.startswith("torch.")]
