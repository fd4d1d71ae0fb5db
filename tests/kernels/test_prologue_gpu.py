"""A decoded token's launch gives the bits that its operations give when each is a launch of its own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.cache import Rounding
from dsv4_kernels.cache.packed import index_bytes, kv_bytes
from dsv4_kernels.compressor import Pending
from dsv4_kernels.norm_rope import frequencies, turns
from dsv4_kernels.prologue import Compression, Keeping, Queries, ref
from tests.kernels.interpreter import QUIET, of
from tests.support.launches import launches
from tests.support.tolerance import RELATIVE, assert_close

pytestmark = QUIET

gpu = of("prologue")

D, INDEX, HEADS, WINDOW = 128, 64, 5, 7  # heads: not as many as a tile takes
FREQS = frequencies(64, 10000)


def compressors(ratio: int) -> int:
    return 2 if ratio == 4 else 1  # only with short groups are there an indexer's


class Memory(NamedTuple):
    """What a layer of such a ratio keeps; of ratio 4 with an indexer's."""

    ring: Tensor
    pending: list[Pending]
    entries: list[Tensor]

    @classmethod
    def of(cls, ratio: int, dtype: torch.dtype) -> Memory:
        packed = dtype == torch.uint8
        rows = [kv_bytes(D, 64), index_bytes(INDEX)] if packed else [D, INDEX]
        widths = [D, INDEX][:compressors(ratio)]
        return cls(alloc.empty((WINDOW, rows[0]), dtype), [Pending.fresh(ratio, d, torch.float32) for d in widths],
                   [alloc.empty((5, row), dtype) for row in rows[:len(widths)]])

    def tensors(self) -> list[Tensor]:
        """All of it, as bits, for what nobody wrote is poison."""
        return [part.view(torch.uint8) for part in (self.ring, *self.entries, *(part for each in self.pending for part in each))]


class Layer(NamedTuple):
    """Weights of a layer, and what a few tokens are projected to."""

    ratio: int
    norms: list[Tensor]
    apes: list[Tensor]
    kv: Tensor
    compressed: list[tuple[Tensor, Tensor]]
    queries: Tensor

    @classmethod
    def drawn(cls, ratio: int, tokens: int, random: torch.Generator) -> Layer:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        widths = [D, INDEX][:compressors(ratio)]
        wide = [Pending.shape(ratio, d)[1] for d in widths]
        return cls(ratio, [normal(d) for d in (D, *widths)], [normal(ratio, width) for width in wide], normal(tokens, D),
                   [(normal(tokens, width), normal(tokens, width)) for width in wide], normal(tokens, HEADS, INDEX))

    def run(self, by: object, memory: Memory, position: int, official: bool, at: Tensor | None = None) -> Tensor:
        """Token `position` by a backend's module; with `at` as if the host described another one of its kind."""
        token, full = slice(position, position + 1), (position + 1) % self.ratio == 0
        angles, firsts = turns(torch.tensor([position]), FREQS), turns(torch.tensor([position // self.ratio * self.ratio]), FREQS)
        kinds: tuple[Rounding, ...] = ("kv", "kv", "index") if official else ("none",) * 3
        keys = Keeping(self.norms[0], angles, kinds[0], *placed(memory.ring, position % WINDOW, at))
        own = zip(self.compressed, self.apes, memory.pending, self.norms[1:], kinds[1:len(self.norms)], memory.entries,
                  strict=True)
        parts = [Compression(kv[token], scores[token], ape, pending,
                             Keeping(norm, firsts, kind, *placed(rows, position // self.ratio, at)) if full else None)
                 for (kv, scores), ape, pending, norm, kind, rows in own]
        queries = Queries(self.queries[token], angles, kinds[2])
        described = position if at is None else (self.ratio - 1 if full else 0)
        return by.attention_prologue(self.kv[token], keys, parts, queries, 1e-6, described, at)


def placed(rows: Tensor, row: int, at: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (rows[row:row + 1], None) if at is None else (rows, torch.tensor([row]))


@pytest.mark.parametrize(("ratio", "official", "dtype"), [
    (4, True, torch.uint8), (4, True, torch.bfloat16), (4, False, torch.float32), (128, True, torch.uint8)])
@pytest.mark.parametrize("live", [False, True])
def test_one_launch_gives_the_bits_of_several(ratio: int, official: bool, dtype: torch.dtype, live: bool, random: torch.Generator,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens on both sides of a full group: of four from the beginning, where nobody is before it; of 128 behind others."""
    layer, positions = Layer.drawn(ratio, 2 * ratio + 1, random), [*range(9)] if ratio == 4 else [126, 127, 128]
    together, apart = (Memory.of(ratio, dtype) for _ in range(2))
    for memory in (together, apart) if ratio == 128 else ():
        memory.pending[0].kv.copy_(layer.compressed[0][0][:ratio])
        memory.pending[0].scores.copy_(layer.compressed[0][1][:ratio])
    for position in positions:
        at = torch.tensor([position]) if live else None
        found = layer.run(gpu, together, position, official, at)
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "_fits", lambda *given: False)
            expected = layer.run(gpu, apart, position, official, at)
        assert torch.equal(found, expected), position
        for one, other in zip(together.tensors(), apart.tensors(), strict=True):
            assert torch.equal(one, other), position


@pytest.mark.parametrize("ratio", [4, 128])
def test_it_is_what_the_reference_keeps(ratio: int, random: torch.Generator) -> None:
    layer = Layer.drawn(ratio, ratio, random)
    found, expected = (Memory.of(ratio, torch.float32) for _ in range(2))
    for position in range(ratio) if ratio == 4 else (0, 126, 127):
        assert_close(layer.run(gpu, found, position, False), layer.run(ref, expected, position, False))
    filled = [(memory.ring[0], *(rows[0] for rows in memory.entries)) for memory in (found, expected)]
    for one, other in zip(*filled, strict=True):
        assert_close(one, other, RELATIVE[torch.float32])


def test_how_many_launches_that_is(random: torch.Generator) -> None:
    alloc.poison(False)
    for ratio, position, most in ((4, 2, 1), (4, 3, 1), (128, 126, 1), (128, 127, 2)):
        layer, memory = Layer.drawn(ratio, ratio, random), Memory.of(ratio, torch.uint8)
        with launches() as log:
            layer.run(gpu, memory, position, True)
        ours = [name for name in log if not name.startswith(("torch.", "norm_rope._turns"))]  # which are given
        assert ours == ["prologue._prologue", "cache._keep_keys"][:most]


def test_more_tokens_and_other_types_go_step_by_step(random: torch.Generator) -> None:
    kv, norm = torch.randn(3, 96, generator=random), torch.randn(96, generator=random)
    angles = turns(torch.arange(3), FREQS)
    queries = Queries(torch.randn(3, 2, 96, generator=random), angles, "none")  # no power of two
    for t in (1, 3):
        rows = [torch.full((t, 96), float("nan")) for _ in range(2)]
        found, expected = (by.attention_prologue(kv[:t], Keeping(norm, angles[:t], "none", to), [],
                                                 Queries(queries.x[:t], angles[:t], "none"), 1e-6, 0, None)
                           for by, to in zip((gpu, ref), rows, strict=True))
        assert_close(found, expected)
        assert_close(*rows)
