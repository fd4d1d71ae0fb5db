from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4_kernels.cache import keep_keys
from dsv4_kernels.indexer import top_indices
from dsv4_kernels.norm_rope import rms_norm
from dsv4_kernels.rounding import hadamard, round_fp4, round_fp8
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound
from tests.support.tolerance import relative_error


def test_official_rounds_and_plain_does_not(bound: Bound, ids: Tensor) -> None:
    official, plain = (bound(name) for name in ("official", "plain"))
    one, other = (model.forward(ids, model.new_state(400), logits="all") for model in (official, plain))
    assert 1e-3 < relative_error(one, other) < 0.5


def test_the_narrow_cache_loses_nothing(bound: Bound, ids: Tensor) -> None:
    """Official values in a bf16 cache give bitwise what they give in a float32 cache."""
    narrow = bound("official")
    wide = Model(narrow.weights, narrow.config, replace(numerics_named("official"), cache=torch.float32))
    logits = [model.forward(ids, model.new_state(400), logits="all") for model in (narrow, wide)]
    assert torch.equal(*logits)


def test_an_official_state_holds_only_what_rounding_leaves(bound: Bound, ids: Tensor) -> None:
    model = bound("official")
    still = model.config.head_dim - model.config.qk_rope_head_dim
    state = model.new_state(400)
    model.forward(ids, state)
    for layer in state.layers:
        rows = [layer.ring.rows, *([layer.entries.store.filled] if layer.entries else [])]
        for kv in (each[:, :still].float() for each in rows):
            assert len(kv) > 0
            assert torch.equal(round_fp8(kv), kv)
        if layer.index:
            keys = layer.index.store.filled.float()
            assert torch.equal(round_fp4(keys), keys)


def test_the_hadamard_turn_meets_itself() -> None:
    """Applied to keys and queries alike it cancels; on one side alone it would choose other entries."""
    random = torch.Generator().manual_seed(1)
    q, keys = torch.randn(5, 3, 32, generator=random), torch.randn(40, 32, generator=random)
    weights, visible = torch.rand(5, 3, generator=random), torch.full((5,), 40)
    straight, both, one = (top_indices(*given, visible, 7).sort().values for given in (
        (q, weights, keys), (hadamard(q), weights, hadamard(keys)), (hadamard(q), weights, keys)))
    assert torch.equal(straight, both)
    assert not torch.equal(straight, one)


def test_only_the_rotated_part_escapes_fp8() -> None:
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    normed, still = rms_norm(x, None, 1e-6), torch.ones(3, 32, dtype=torch.complex64)
    kept = {name: torch.zeros(3, 192) for name in ("official", "plain")}
    for name, to in kept.items():
        keep_keys(x, torch.ones(192), 1e-6, still, numerics_named(name).kv, to)
    assert torch.equal(kept["official"], torch.cat([round_fp8(normed[:, :128]), normed[:, 128:].to(torch.bfloat16).float()], -1))
    assert torch.equal(kept["plain"], normed)
    assert [numerics_named(name).index for name in ("official", "plain")] == ["index", "none"]
