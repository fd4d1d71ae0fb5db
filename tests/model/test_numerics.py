from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.transformer import Model
from tests.model.conftest import Bound
from tests.support.tolerance import relative_error


def test_the_narrow_cache_loses_nothing(bound: Bound, ids: Tensor) -> None:
    """Official values in a bf16 cache give bitwise what they give in a float32 cache."""
    narrow = bound("official")
    wide = Model(narrow.weights, narrow.config, replace(numerics_named("official"), cache=torch.float32))
    logits = [model.forward(ids, model.new_state(400), logits="all") for model in (narrow, wide)]
    assert torch.equal(*logits)


def test_official_rounds_and_plain_does_not(bound: Bound, ids: Tensor) -> None:
    official, plain = (bound(name) for name in ("official", "plain"))
    one, other = (model.forward(ids, model.new_state(400), logits="all") for model in (official, plain))
    assert 1e-3 < relative_error(one, other) < 0.5


def test_only_the_rotated_part_escapes_fp8() -> None:
    numerics = numerics_named("official")
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    kept = numerics.kv(x, 64)
    assert torch.equal(kept[:, 128:], x[:, 128:].to(torch.bfloat16).float())
    codes = kept[:, :64] / torch.exp2(torch.ceil(torch.log2(x[:, :64].abs().amax(-1, keepdim=True) / 448)))
    assert torch.equal(codes, codes.to(torch.float8_e4m3fn).float())
    assert not torch.equal(kept[:, :128], x[:, :128].to(torch.bfloat16).float())
    assert numerics_named("plain").kv(x, 64) is x
    assert numerics_named("plain").index(x) is x
