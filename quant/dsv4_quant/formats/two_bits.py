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
    """bytes [n, 64] of float levels 0..3 in pieces' order, [16, 16, n]."""
    quarters = levels.unflatten(1, (2, 4, 2))  # [16, half, quarter, which 16 of its 32, n]
    packed = quarters[:, :, 0] + 4 * quarters[:, :, 1] + 16 * quarters[:, :, 2] + 64 * quarters[:, :, 3]
    return packed.to(torch.uint8).permute(3, 1, 2, 0).flatten(1)
