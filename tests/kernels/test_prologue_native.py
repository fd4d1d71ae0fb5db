from __future__ import annotations

import pytest
import torch

from tests.kernels.native import kernels  # noqa: F401
from tests.kernels.test_prologue import demand_same_as_operations


@pytest.mark.usefixtures("kernels")
def test_it_is_its_operations_one_after_the_other(random: torch.Generator) -> None:
    demand_same_as_operations(random)
