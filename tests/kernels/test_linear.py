from __future__ import annotations

import pytest
import torch

from dsv4_kernels.linear import embed, grouped_linear, linear
from tests.support.tolerance import assert_close


def test_groups_have_matrices_of_their_own(random: torch.Generator) -> None:
    x, weight = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((5, 3, 7), (12, 7)))
    out = grouped_linear(x, weight)
    assert out.shape == (5, 3, 4)
    for group in range(3):
        assert_close(out[:, group], x[:, group] @ weight[4 * group:4 * group + 4].T)


def test_inputs_may_have_any_leading_shape(random: torch.Generator) -> None:
    x, weight = torch.randn(2, 3, 8, generator=random), torch.randn(5, 8, generator=random)
    assert_close(linear(x, weight), (x.double() @ weight.double().T).float())


def test_doors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[5, 8\], but \[any, 7\]"):
        linear(torch.zeros(1, 7), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="weight rows is 5, but must be a positive multiple of 3"):
        grouped_linear(torch.zeros(1, 3, 8), torch.zeros(5, 8))
    with pytest.raises(ValueError, match=r"ids has shape \[1, 1\]"):
        embed(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(5, 8))
