"""How far numbers may be apart: one table for all tests.

Errors are measured as RMS of the difference over RMS of the expected values, which one outlier near zero cannot spoil.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An operation against the same operation in float64: a few times the unit roundoff of the type it computes in.
RELATIVE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

CHUNKS = 1e-5  # logits of one pass against logits of many: only the order of float32 sums differs
ORACLE = 1e-4  # logits against another implementation of the model, float32 all through


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64; NaN anywhere makes it NaN."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Same shape, and a relative error within `tolerance` (by default that of actual's dtype)."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    tolerance = RELATIVE[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} is above {tolerance:.3g}"
