"""However a text is cut into calls, the logits are the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsv4cli.model import transformer
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound
from tests.support.tolerance import CHUNKS, assert_close


def in_chunks(model: Model, ids: Tensor, sizes: list[int]) -> Tensor:
    state = model.new_state(len(ids))
    return torch.cat([model.forward(chunk, state, logits="all") for chunk in ids.split(sizes)])


def evenly(total: int, size: int) -> list[int]:
    return [size] * (total // size) + [total % size] * (total % size > 0)


@pytest.mark.parametrize("size", [1, 3, 4, 127, 128, 129])
def test_chunks_of_one_size(size: int, bound: Bound, ids: Tensor) -> None:
    model = bound()
    assert_close(in_chunks(model, ids, evenly(len(ids), size)), in_chunks(model, ids, [len(ids)]), CHUNKS)


@pytest.mark.parametrize("borders", [[1, 4, 131, 132, 260], [3, 130, 133, 261, 390], [128, 129, 256, 384, 388]])
def test_chunks_of_many_sizes(borders: list[int], bound: Bound, ids: Tensor) -> None:
    """Borders before, on and after those of groups and windows, so that each is crossed from each side."""
    sizes = [b - a for a, b in pairwise([0, *borders, len(ids)])]
    model = bound()
    assert_close(in_chunks(model, ids, sizes), in_chunks(model, ids, [len(ids)]), CHUNKS)


def test_long_inputs_are_cut_into_pieces(bound: Bound, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bound()
    whole = in_chunks(model, ids, [len(ids)])
    monkeypatch.setattr(transformer, "PIECE", 90)
    assert_close(in_chunks(model, ids, [len(ids)]), whole, CHUNKS)


def test_last_and_none_are_parts_of_all(bound: Bound, ids: Tensor) -> None:
    model = bound()
    whole, state = in_chunks(model, ids[:50], [50]), model.new_state(50)
    assert model.forward(ids[:20], state, logits="none").shape == (0, model.config.vocab_size)
    last = model.forward(ids[20:50], state)
    assert last.shape == (1, model.config.vocab_size)
    assert_close(last, whole[-1:], CHUNKS)
    last += 1  # the caller owns its logits


def test_official_rounding_only_jumps_where_a_value_is_on_the_edge(bound: Bound, ids: Tensor) -> None:
    """A float32 difference of 1e-7 can push a value over the edge between two codes, which then differ by 6 %. So official
    logits are equal to plain precision while no value is near an edge, and close all the way."""
    model = bound("official")
    one, other = in_chunks(model, ids[:40], [40]), in_chunks(model, ids[:40], [1] * 40)
    assert_close(other[:2], one[:2], CHUNKS)
    assert_close(other, one, 2e-2)
