"""Two bits for each of 256 elements in 64 bytes, as Q2_K and Q3_K store them.

Byte l of either half holds the elements l, l + 32, l + 64 and l + 96 of its 128, the first lowest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(stored: Tensor) -> Tensor:
    """uint8 [..., 256] of bytes [..., 64]."""
    place = torch.arange(0, 8, 2, dtype=torch.uint8, device=stored.device)[:, None]
    return (stored.unflatten(-1, (2, 1, 32)) >> place & 3).flatten(-3)


def pack(levels: Tensor) -> Tensor:
    """bytes [n, 64] of uint8 levels 0..3, [n, ...] of 256."""
    quarters = levels.view(-1, 2, 4, 32)
    packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return packed.flatten(1)
