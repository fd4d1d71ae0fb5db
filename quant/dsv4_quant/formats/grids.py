"""The look-up tables of GGUF's IQ formats, as bytes: which magnitudes a code stands for."""

from __future__ import annotations

import gguf
import torch
from torch import Tensor


def iq2_xxs() -> Tensor:
    """uint8 [256, 8]: magnitudes 8, 25 or 43."""
    return _grid(gguf.quants.IQ2_XXS).to(torch.uint8)


def iq2_xs() -> Tensor:
    """uint8 [512, 8]: magnitudes 8, 25 or 43."""
    return _grid(gguf.quants.IQ2_XS).to(torch.uint8)


def iq3_xxs() -> Tensor:
    """uint8 [256, 4]: magnitudes 4, 12, 20 ... 62."""
    return _grid(gguf.quants.IQ3_XXS).to(torch.uint8)


def iq1_m() -> Tensor:
    """int8 [2048, 8]: values -1, 0 or 1."""
    return _grid(gguf.quants.IQ1_M).to(torch.int8)


def _grid(kind: type) -> Tensor:
    kind.init_grid()  # type: ignore[attr-defined]  # a class method of gguf's own base class
    rows = torch.from_numpy(kind.grid)  # type: ignore[attr-defined]
    return rows.reshape(kind.grid_shape).contiguous()  # type: ignore[attr-defined]
