"""The look-up tables of GGUF's IQ formats, as bytes: which magnitudes a code stands for."""

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


def _grid(kind: type) -> Tensor:
    kind.init_grid()  # type: ignore[attr-defined]  # a class method of gguf's own base class
    rows = torch.from_numpy(kind.grid).reshape(kind.grid_shape)  # type: ignore[attr-defined]
    return rows.to(torch.uint8).contiguous()
