from __future__ import annotations

import pytest
import torch

from dsv4_kernels.cache import Rounding, keep_keys
from dsv4_kernels.compressor import Pending, compress
from dsv4_kernels.norm_rope import frequencies, rotate, turns
from dsv4_kernels.prologue import Compression, Keeping, Queries, attention_prologue
from dsv4_kernels.rounding import round_index

FREQS = frequencies(64, 10000)


def keeping(n: int, d: int, rounding: Rounding, random: torch.Generator, first: int = 0) -> Keeping:
    to = torch.full((n, d), float("nan"))
    return Keeping(torch.randn(d, generator=random), turns(torch.arange(first, first + n), FREQS), rounding, to)


def demand_same_as_operations(random: torch.Generator) -> None:
    """A prompt of 9 tokens behind 3 others completes three groups of four."""
    kv, x = torch.randn(9, 128, generator=random), torch.randn(9, 3, 64, generator=random)
    inputs, ape = torch.randn(2, 9, 256, generator=random), torch.randn(4, 256, generator=random)
    pending, expected = (Pending.fresh(4, 128, torch.float32) for _ in range(2))
    keys, entries = keeping(9, 128, "kv", random), keeping(3, 128, "index", random)
    rows, pooled_rows = torch.zeros(9, 128), torch.zeros(3, 128)
    for rounding, turned in (("index", round_index(x, keys.turns)), ("none", rotate(x, keys.turns))):
        queries = Queries(x, keys.turns, rounding)
        found = attention_prologue(kv, keys, [Compression(*inputs, ape, pending, entries)], queries, 1e-6, 3)
        assert found is not None
        assert torch.equal(found, turned)
        keep_keys(kv, keys.norm, 1e-6, keys.turns, "kv", rows)
        keep_keys(compress(*inputs, ape, expected, 3), entries.norm, 1e-6, entries.turns, "index", pooled_rows)
        assert torch.equal(keys.to, rows)
        assert torch.equal(entries.to, pooled_rows)
        assert torch.equal(pending.kv, expected.kv)


def test_it_is_its_operations_one_after_the_other(random: torch.Generator) -> None:
    demand_same_as_operations(random)


def test_what_does_not_fit_is_said(random: torch.Generator) -> None:
    kv, keys = torch.zeros(1, 128), keeping(1, 128, "kv", random)
    part = Compression(torch.zeros(1, 256), torch.zeros(1, 256), torch.zeros(4, 256), Pending.fresh(4, 128, torch.float32), None)
    with pytest.raises(ValueError, match="complete 1 groups of 4, which nobody keeps"):
        attention_prologue(kv, keys, [part], None, 1e-6, 7)
    with pytest.raises(ValueError, match=r"turns has shape \[1, 32\], but \[0, 32\]"):
        attention_prologue(kv, keys, [part._replace(entries=keys)], None, 1e-6, 6)
    with pytest.raises(ValueError, match=r"kv has shape \[2, 256\], but \[1, 256\]"):
        attention_prologue(kv, keys, [part._replace(kv=torch.zeros(2, 256), scores=torch.zeros(2, 256))], None, 1e-6, 0)
    with pytest.raises(ValueError, match="index queries"):
        attention_prologue(kv, keys, [], Queries(torch.zeros(2, 3, 64), keys.turns, "none"), 1e-6, 0)
