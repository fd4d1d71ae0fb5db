"""Eight scales and eight minima of six bits in twelve bytes, as Q4_K and Q5_K store them.

Bytes 0..3 and 4..7: scales and minima 0..3 in the low six bits; bytes 8..11: the low four bits of scale (low nibble) and
minimum (high nibble) 4..7, whose upper two lie on top of bytes 0..3 and 4..7.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(stored: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, minima) uint8 [n, 8] of bytes [n, 12]."""
    first, second, third = stored.unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1)
    return scales, torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1)


def pack(scales: Tensor, minima: Tensor) -> Tensor:
    """bytes [n, 12] of numbers 0..63, [n, 8] each, of any type."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first, second = s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], dim=1)
