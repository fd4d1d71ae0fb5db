from __future__ import annotations

import pytest
import torch

from dsv4_kernels import alloc
from dsv4_kernels.backends import OPERATIONS, BackendError, pick
from dsv4_kernels.norm_rope import rms_norm


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_has_a_reference_and_says_why_it_ran(op: str) -> None:
    choice = pick(op, "cpu", "ref")
    assert choice.module.__name__ == f"dsv4_kernels.{op}.ref"
    assert choice.reason == "it was asked for"
    assert pick(op, "cpu").reason


def test_nothing_falls_back_unseen() -> None:
    with pytest.raises(BackendError, match="no backend 'quick'") as caught:
        pick("moe", "cpu", "quick")
    assert "ref" in caught.value.hint
    with pytest.raises(BackendError, match="gpu"):
        pick("moe", "cpu", "gpu")
    with pytest.raises(BackendError, match="'gpu'"):
        rms_norm(torch.zeros(1, 2), None, 1e-6, backend="gpu")
    with pytest.raises(ValueError, match="no operation 'soup'"):
        pick("soup")


def test_poison_fills_new_memory() -> None:
    assert alloc.empty((2, 3), torch.float32).isnan().all()
    assert alloc.empty((2,), torch.int64).tolist() == [torch.iinfo(torch.int64).min] * 2
    assert alloc.full((2,), 1.5, torch.float32).tolist() == [1.5, 1.5]
