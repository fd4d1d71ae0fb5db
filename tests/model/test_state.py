from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_kernels.cache.packed import index_bytes, kv_bytes
from dsv4_quant.config import ModelConfig
from dsv4cli.errors import CorruptError, UsageError
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.sizes import state_bytes
from dsv4cli.model.state import Snapshot, State
from tests.model.conftest import Bound
from tests.quant.releases import FLASH, PRO


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_size_is_known_before_the_first_token(numerics: str, bound: Bound, ids: Tensor) -> None:
    model = bound(numerics)
    state = model.new_state(1500)
    assert state.nbytes == State.bytes_for(model.config, 0, numerics)
    for _ in range(3):
        model.forward(ids[:400], state, logits="none")
        assert state.nbytes == State.bytes_for(model.config, state.capacity, numerics)
        assert state.position <= state.capacity <= 1500
    assert state.capacity == 1500
    assert state.nbytes == State.bytes_for(model.config, 1500, numerics)


def test_official_entries_take_half_the_bytes(bound: Bound) -> None:
    config = bound().config
    grown = [State.bytes_for(config, 4096, each) - State.bytes_for(config, 0, each) for each in ("plain", "official")]
    assert grown[0] == 2 * grown[1] > 0


def test_bytes_are_those_of_the_layout(bound: Bound) -> None:
    """Layers 0 0 4 128 4 with heads of 128 and index keys of 64, in float32, after the layout's definition."""
    rings = 5 * 128 * 128 * 4
    ratio_4 = 2 * (2 * 8 * 256 * 4 + 2 * 8 * 128 * 4 + 1000 // 4 * (128 + 64) * 4)
    ratio_128 = 2 * 128 * 128 * 4 + 1000 // 128 * 128 * 4
    assert State.bytes_for(bound().config, 1000, "plain") == rings + ratio_4 + ratio_128


@pytest.mark.parametrize(("release", "layers"), [(FLASH, (21, 20)), (PRO, (30, 31))], ids=["flash", "pro"])
def test_packed_entries_take_the_published_bytes(release: dict[str, Any], layers: tuple[int, int]) -> None:
    """1M tokens as in spec/checkpoint.md section 3.14; rings and groups that are being filled come to it."""
    entries = layers[0] * 262_144 * (583 + 68) + layers[1] * 8192 * 583
    config = ModelConfig.from_dict(release, "config.json")
    packed = [state_bytes(config, tokens, "official", packed=True) for tokens in (0, 1 << 20)]
    assert packed[1] - packed[0] == entries
    if release is FLASH:
        assert packed[1] < 4_000_000_000 < state_bytes(config, 1 << 20, "official")


def test_a_packed_state_of_a_million_tokens_of_flash_is_below_4_gb() -> None:
    """Made without memory behind it, so that storage itself is counted and not the formula."""
    config = ModelConfig.from_dict(FLASH, "config.json")
    state = State(config, 1 << 20, numerics_named("official"), "meta", packed=True)
    state.reserve(1 << 20)
    assert state.nbytes == State.bytes_for(config, 1 << 20, "official", packed=True) < 4_000_000_000


@pytest.mark.parametrize("release", [FLASH, PRO], ids=["flash", "pro"])
def test_packed_rows_are_as_long_as_packing_makes_them(release: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(release, "config.json")
    grown = [state_bytes(config, 128 * n, "official", packed=True) for n in (0, 1)]
    ratios = [config.ratio(layer) for layer in range(config.num_hidden_layers)]
    key, index = kv_bytes(config.head_dim, config.qk_rope_head_dim), index_bytes(config.index_head_dim)
    assert grown[1] - grown[0] == ratios.count(128) * key + ratios.count(4) * 32 * (key + index)


def test_plain_numerics_cannot_be_packed() -> None:
    with pytest.raises(UsageError, match="plain numerics cannot be packed"):
        state_bytes(ModelConfig.from_dict(FLASH, "config.json"), 1, "plain", packed=True)


@pytest.mark.parametrize("numerics", ["plain", "official"])
@pytest.mark.parametrize("position", [1, 3, 127, 128, 129, 261])
def test_restoring_continues_bitwise(position: int, numerics: str, bound: Bound, ids: Tensor) -> None:
    model = bound(numerics)
    chunks = ids[position:position + 130].split([5, 1, 124])
    state = model.new_state(400)
    model.forward(ids[:position], state)
    snapshot = state.snapshot()
    after = torch.cat([model.forward(chunk, state, logits="all") for chunk in chunks])

    state.restore(snapshot)  # back, over what was overwritten since
    assert state.position == snapshot.position == position
    assert torch.equal(torch.cat([model.forward(chunk, state, logits="all") for chunk in chunks]), after)

    elsewhere = model.new_state(391)  # another size, and the snapshot by way of a file's tensors
    elsewhere.restore(Snapshot.from_tensors(position, snapshot.tensors()))
    assert torch.equal(torch.cat([model.forward(chunk, elsewhere, logits="all") for chunk in chunks]), after)


def test_packed_states_and_others_go_on_from_each_others_snapshots(bound: Bound, ids: Tensor) -> None:
    """A session may go on on another device, whose caches have another form."""
    model = bound("official")
    state, packed = model.new_state(300), State(model.config, 300, model.numerics, packed=True)
    assert packed.nbytes == State.bytes_for(model.config, 0, "official", packed=True)
    model.forward(ids[:261], state)
    before = state.snapshot()
    packed.restore(Snapshot.from_tensors(261, before.tensors()))
    assert packed.nbytes == State.bytes_for(model.config, 300, "official", packed=True)
    assert packed.snapshot().nbytes < before.nbytes
    state.restore(packed.snapshot())
    after = state.snapshot()
    assert before.contents.keys() == after.contents.keys()
    assert all(torch.equal(after.contents[name], tensor) for name, tensor in before.contents.items())
    with pytest.raises(CorruptError, match="ring are no rows of official numerics"):
        packed.restore(Snapshot(261, {**before.contents, "layers.0.ring": before.contents["layers.0.ring"] + 1}))
    with pytest.raises(UsageError, match="plain numerics cannot be packed"):
        State(model.config, 300, bound("plain").numerics, packed=True)


def test_a_snapshot_is_a_copy_and_knows_its_size(bound: Bound, ids: Tensor) -> None:
    model = bound()
    state = model.new_state(400)
    model.forward(ids[:200], state)
    snapshot = state.snapshot()
    before = {name: tensor.clone() for name, tensor in snapshot.tensors().items()}
    model.forward(ids[200:], state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot.tensors().items())
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in before.values())
    assert not any(tensor.isnan().any() for tensor in before.values())  # nothing that nobody wrote


def test_the_empty_snapshot_is_a_fresh_state(bound: Bound, ids: Tensor) -> None:
    model = bound()
    state = model.new_state(400)
    nothing = state.snapshot()
    first = model.forward(ids[:150], state)
    state.restore(nothing)
    assert torch.equal(model.forward(ids[:150], state), first)


def test_strange_snapshots_are_refused_and_change_nothing(bound: Bound, ids: Tensor) -> None:
    model = bound()
    state = model.new_state(400)
    model.forward(ids[:50], state)
    tensors = state.snapshot().tensors()
    expected = model.forward(ids[50:60], state)
    state.restore(Snapshot.from_tensors(50, tensors))

    with pytest.raises(CorruptError, match=r"lacks tensor layers\.0\.ring"):
        state.restore(Snapshot.from_tensors(50, {name: each for name, each in tensors.items() if name != "layers.0.ring"}))
    with pytest.raises(CorruptError, match=r"layers\.0\.ring is torch.float32 \[50, 128\].*\[49, 128\]"):
        state.restore(Snapshot.from_tensors(49, tensors))
    with pytest.raises(CorruptError, match="bfloat16"):
        state.restore(bound("official").new_state(60).snapshot())
    with pytest.raises(UsageError, match="450 tokens do not fit into a state of 400"):
        state.restore(Snapshot.from_tensors(450, tensors))
    assert torch.equal(model.forward(ids[50:60], state), expected)


def test_more_tokens_than_there_is_room_for(bound: Bound, ids: Tensor) -> None:
    model = bound()
    state = model.new_state(10)
    model.forward(ids[:8], state)
    with pytest.raises(UsageError, match="11 tokens do not fit into a state of 10"):
        model.forward(ids[8:11], state)
    assert state.position == 8
    model.forward(ids[8:10], state)


@pytest.mark.parametrize(("bad", "words"), [([-1], "-1 is outside the vocabulary of 512"), ([3, 512], "512 is outside"),
                                            ([], "non-empty")])
def test_ids_that_are_none(bad: list[int], words: str, bound: Bound) -> None:
    model = bound()
    with pytest.raises(UsageError, match=words):
        model.forward(torch.tensor(bad, dtype=torch.int64), model.new_state(10))


def test_an_interrupted_pass_cannot_be_built_upon(bound: Bound, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bound()
    state = model.new_state(400)
    model.forward(ids[:20], state)
    snapshot = state.snapshot()
    expected = model.forward(ids[20:25], state)
    state.restore(snapshot)

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.blocks[2], "moe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.forward(ids[20:25], state)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="interrupted"):
        model.forward(ids[20:25], state)
    with pytest.raises(UsageError, match="interrupted"):
        state.snapshot()
    state.restore(snapshot)
    assert torch.equal(model.forward(ids[20:25], state), expected)
