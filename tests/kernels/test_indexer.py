from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels import tiles
from dsv4_kernels.indexer import top_indices


def drawn(t: int, n: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """32 heads: with few, all products of a key can be negative, its score exactly 0, and zeros tie."""
    shapes = ((t, 32, 16), (t, 32), (n, 16))
    q, weights, keys = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return q, weights, keys


def by_hand(q: Tensor, weights: Tensor, keys: Tensor, visible: int, k: int) -> set[int]:
    """The chosen entries of one token, from the definition."""
    def score(key: Tensor) -> float:
        return sum(float(weight) * max(0.0, float(head @ key)) for weight, head in zip(weights, q, strict=True))

    scores = [score(key) for key in keys[:visible]]
    return set(sorted(range(visible), key=lambda entry: -scores[entry])[:k])


@pytest.mark.parametrize("tile", [1 << 24, 32 * 23])  # all at once; one token at a time
def test_the_best_visible_entries_are_chosen(tile: int, random: torch.Generator,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_VALUES", tile)
    q, weights, keys = drawn(6, 23, random)
    visible = torch.tensor([0, 1, 5, 8, 22, 23])
    chosen = top_indices(q, weights, keys, visible, 5)
    assert chosen.shape == (6, 5)
    for token, row in enumerate(chosen.tolist()):
        kept = [entry for entry in row if entry >= 0]
        assert len(kept) == len(set(kept)) == min(5, int(visible[token]))
        assert set(kept) == by_hand(q[token], weights[token], keys, int(visible[token]), 5)


def test_fewer_entries_than_k_are_all_chosen(random: torch.Generator) -> None:
    chosen = top_indices(*drawn(2, 3, random), torch.tensor([3, 3]), 8)
    assert sorted(chosen[0].tolist()) == [0, 1, 2]


def test_keys_may_be_narrower(random: torch.Generator) -> None:
    q, weights, keys = drawn(2, 40, random)
    keys = keys.to(torch.bfloat16)
    visible = torch.tensor([40, 40])
    narrow, wide = (top_indices(q, weights, each, visible, 7) for each in (keys, keys.double()))
    assert torch.equal(narrow.sort(-1).values, wide.sort(-1).values)


def test_doors_name_the_numbers(random: torch.Generator) -> None:
    q, weights, keys = drawn(2, 4, random)
    with pytest.raises(ValueError, match=r"index keys has shape \[4, 15\], but \[any, 16\]"):
        top_indices(q, weights, keys[:, 1:], torch.tensor([1, 1]), 2)
    with pytest.raises(ValueError, match="k is 0"):
        top_indices(q, weights, keys, torch.tensor([1, 1]), 0)
