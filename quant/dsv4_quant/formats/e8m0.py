"""E8M0, the scale of the official formats: one byte b that means 2^(b - 127); 255 is not a number."""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [float("nan")], dtype=torch.float32)


def decode(scales: Tensor) -> Tensor:
    """float32 of scales stored as E8M0 (as such or as raw bytes) or, in Base checkpoints, as F32."""
    if scales.dtype == torch.float32:
        return scales
    return _VALUES.to(scales.device)[scales.view(torch.uint8).long()]


def ceiling(amax: Tensor, largest: float) -> Tensor:
    """float32: the smallest power of two s with amax / s <= largest; rows of zeros get the smallest scale, 2^-127."""
    mantissa, exponent = torch.frexp(amax.double() / largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # an exact power of two needs no more
    exponent = torch.where(amax > 0, exponent, torch.full_like(exponent, -127)).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(amax, dtype=torch.float32), exponent)


def encode(scales: Tensor) -> Tensor:
    """float8_e8m0fnu of float32 powers of two."""
    _, exponent = torch.frexp(scales)
    return (exponent + 126).clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)
