"""Long prompts over long pasts: no tensor that grows with tokens times entries is ever made whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_kernels import tiles
from dsv4_kernels.attention import Entries, sparse_attention
from dsv4_kernels.indexer import top_indices
from dsv4_kernels.tiles import tiles as cut

T, HEADS, D, N, WINDOW, K = 300, 4, 8, 500, 16, 100
TILE = 1 << 14  # T * HEADS * N is 36 times as much


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return out


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_VALUES", TILE)


def test_index_scores_stay_within_a_tile(random: torch.Generator) -> None:
    q, weights, keys = (torch.randn(shape, generator=random) for shape in ((T, HEADS, D), (T, HEADS), (N, D)))
    with Largest() as largest:
        top_indices(q, weights, keys, torch.full((T,), N), K)
    assert T * K <= largest.values <= max(TILE, T * K)  # the answer itself is T * K


@pytest.mark.parametrize("chosen", [False, True])
def test_attention_scores_stay_within_a_tile(chosen: bool, random: torch.Generator) -> None:
    shapes = ((T, HEADS, D), (T, D), (N, D), (HEADS,))
    q, recent, kv, sink = (torch.randn(shape, generator=random) for shape in shapes)
    picks = torch.randint(0, N, (T, K), generator=random) if chosen else None
    with Largest() as largest:
        sparse_attention(q, recent, Entries(kv, torch.full((T,), N), picks), sink, WINDOW)
    assert T * HEADS * D <= largest.values <= TILE


def test_tiles_cover_every_row_once() -> None:
    for rows, per_row, most in ((1, 1, 9), (100, TILE // 7, 9), (100, 1, 9), (100, 10 * TILE, 9), (0, 1, 9)):
        parts = list(cut(rows, per_row, most))
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
        assert all(part.stop - part.start <= most for part in parts)
