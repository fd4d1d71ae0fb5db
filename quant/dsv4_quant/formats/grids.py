"""The look-up tables of GGUF's IQ formats, as bytes: which magnitudes a code stands for, and which signs."""

from __future__ import annotations

import gguf
import torch
from torch import Tensor


def iq2_xxs() -> Tensor:
    """uint8 [256, 8]: magnitudes 8, 25 or 43."""
    return _grid(gguf.quants.IQ2_XXS)


def iq3_xxs() -> Tensor:
    """uint8 [256, 4]: magnitudes 4, 12, 20 ... 62."""
    return _grid(gguf.quants.IQ3_XXS)


def signs() -> Tensor:
    """uint8 [128]: seven sign bits, and an eighth that makes their number even."""
    patterns = torch.arange(128)
    parity = sum((patterns >> bit) & 1 for bit in range(7)) % 2
    return (patterns | (parity << 7)).to(torch.uint8)


def _grid(kind: type) -> Tensor:
    kind.init_grid()  # type: ignore[attr-defined]  # a class method of gguf's own base class
    rows = torch.from_numpy(kind.grid).reshape(kind.grid_shape)  # type: ignore[attr-defined]
    return rows.to(torch.uint8).contiguous()
