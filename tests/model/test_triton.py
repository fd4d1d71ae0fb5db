"""A whole model whose operations are all computed by the Triton kernels, in Triton's interpreter: what a card would run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.moe import routed_experts, shared_expert
from dsv4_quant.files import open_source
from dsv4cli.model import experts
from dsv4cli.model.experts import TieredExperts
from dsv4cli.model.slots import Room
from dsv4cli.model.transformer import Model
from tests.kernels.interpreter import QUIET
from tests.support.synth import Checkpoint, Shape
from tests.support.tolerance import CHUNKS, assert_close

pytest.importorskip("triton")
pytestmark = QUIET
# Every kind of layer, and an indexer that has more entries than it may choose after 20 tokens.
SMALL = Shape(ratios=(0, 4, 128), experts=4, heads=2, index_heads=8, index_topk=4, vocab=64)
SIZES = [21, 1, 1, 1]  # the last two complete a group of four


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(SMALL, seed=5).write(tmp_path_factory.mktemp("synth"))


def walked(model: Model, sizes: list[int]) -> Tensor:
    """Logits of the last token of each chunk."""
    ids = torch.randint(0, SMALL.vocab, (sum(sizes),), generator=torch.Generator().manual_seed(5))
    state = model.new_state(len(ids))
    return torch.cat([model.forward(chunk, state) for chunk in ids.split(sizes)])


def test_plain_numerics_compute_what_the_reference_computes(small: Path, request: pytest.FixtureRequest) -> None:
    """Prompt and decoded tokens, on packed weights, with chunks that end elsewhere."""
    ran: set[str] = set()
    with backends.interpreted():
        assert {backends.pick(op).name for op in backends.OPERATIONS} == {"gpu"}
        with backends.watched(lambda door, _: ran.add(door)):
            fast = walked(Model.bind(open_source(small), numerics="plain", expand_limit=0), SIZES)
    assert {"linears", "grouped_linear", "mix_streams", "attention_prologue", "top_indices", "sparse_attention",
            "project_into_streams", "experts_into_streams"} <= ran
    request.getfixturevalue("on_reference")
    model = Model.bind(open_source(small), numerics="plain", expand_limit=0)
    assert_close(fast, walked(model, SIZES), CHUNKS)


def test_slots_of_a_card_are_read_by_its_kernels(small: Path, request: pytest.FixtureRequest,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one layer's four experts a card holds two; the host's part and what passes through are computed as well."""
    layer = Model.bind(open_source(small), numerics="plain", expand_limit=0).weights.layers[1].moe
    given = {tokens: (torch.randn(tokens, SMALL.hidden), torch.rand(tokens, 2),
                      torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])) for tokens in (1, 3)}
    monkeypatch.setattr(experts, "BESIDE", 2)
    tiers = TieredExperts([layer.experts], [Room("cpu", 0, 1, 2)], 2, [(0, 3), (0, 1)]).layers[0]
    with backends.interpreted():
        made = [tiers._of_several(*each, layer.shared, 10.) for each in given.values()]
    request.getfixturevalue("on_reference")
    for out, (x, shares, chosen) in zip(made, given.values(), strict=True):
        assert_close(out, routed_experts(x, shares, chosen, layer.experts, 10., onto=shared_expert(x, layer.shared, 10.)))


def test_official_numerics_take_a_prompt_in_any_chunks(small: Path) -> None:
    with backends.interpreted():
        model = Model.bind(open_source(small), numerics="official", expand_limit=0)
        whole, chunks = walked(model, [13]), walked(model, [9, 3, 1])
    assert torch.equal(whole[-1].argmax(), chunks[-1].argmax())
    assert_close(chunks[-1], whole[-1], CHUNKS)
