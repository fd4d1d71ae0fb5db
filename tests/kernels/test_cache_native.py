from __future__ import annotations

from typing import get_args

import pytest
import torch

from dsv4_kernels.cache import Rounding, keep, keep_keys
from dsv4_kernels.norm_rope import frequencies, turns
from dsv4_kernels.norm_rope.cpu import norm_rotate
from dsv4_kernels.rounding import round_index, round_kv
from tests.kernels.native import kernels  # noqa: F401

pytestmark = pytest.mark.usefixtures("kernels")

ROUND = {"none": lambda x, rotated: x, "kv": round_kv, "index": lambda x, rotated: round_index(x)}


@pytest.mark.parametrize("rounding", get_args(Rounding))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "pairs"), [(128, 32), (512, 32)])
def test_a_key_is_made_in_one_go_as_step_by_step(d: int, pairs: int, dtype: torch.dtype, rounding: Rounding,
                                                 random: torch.Generator) -> None:
    for t in (1, 2, 127):
        x, norm = torch.randn(t, d, generator=random) * 3, torch.randn(d, generator=random)
        table = turns(torch.arange(9, 9 + t), frequencies(2 * pairs, 10000))
        found, expected = (torch.full((t + 2, d), float("nan"), dtype=dtype) for _ in range(2))
        keep_keys(x, norm, 1e-6, table, rounding, found[1:-1])
        keep(ROUND[rounding](norm_rotate(x, norm, 1e-6, table), 2 * pairs), expected[1:-1])
        assert torch.equal(found[1:-1], expected[1:-1])
        assert found[[0, -1]].isnan().all()  # and nothing beside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_memory_says_where_a_key_is_kept(dtype: torch.dtype, random: torch.Generator) -> None:
    x, norm, table = torch.randn(1, 128, generator=random), torch.ones(128), turns(torch.arange(1), frequencies(64, 10000))
    found, expected = (torch.full((7, 128), float("nan"), dtype=dtype) for _ in range(2))
    keep_keys(x, norm, 1e-6, table, "kv", found, torch.tensor([5]))
    keep_keys(x, norm, 1e-6, table, "kv", expected[5:6])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[5], expected[5])


def test_what_does_not_fit_is_refused() -> None:
    x, norm, table, to = torch.zeros(2, 96), torch.ones(96), torch.ones(2, 16, dtype=torch.complex64), torch.zeros(2, 96)
    keep_keys(x, norm, 1e-6, table, "kv", to)
    wrong = [((x, norm[1:], 1e-6, table, "kv", to), "norm weight"), ((x, norm, 1e-6, table[1:], "kv", to), "turns"),
             ((x, norm, 1e-6, table, "kv", to[1:]), "cache rows"), ((x, norm, 1e-6, table, "fp3", to), "no rounding"),
             ((x, norm, 1e-6, table[:, 1:], "kv", to), "rounded part")]
    for given, complaint in wrong:
        with pytest.raises(ValueError, match=complaint):
            keep_keys(*given)
