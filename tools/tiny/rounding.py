"""Rounding to the stored grids: FP8 e4m3 in 128x128 tiles and FP4 e2m1 in rows of 32, power-of-two scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
# Upper ends of the rounding intervals of 0, .5, 1, 1.5, 2, 3, 4, 6.
_FP4_EDGES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def power_of_two(amax: Tensor, top: float) -> Tensor:
    """The smallest power of two s with amax / s <= top."""
    mantissa, exponent = torch.frexp(amax.clamp_min(1e-12) / top)
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).to(exponent.dtype))


def fp8_scales(value: Tensor) -> Tensor:
    """float32 [ceil(o/128), ceil(i/128)] tile scales of a matrix [o, i]."""
    o, i = value.shape
    tiles = F.pad(value, (0, -i % 128, 0, -o % 128)).view(-(-o // 128), 128, -(-i // 128), 128)
    return power_of_two(tiles.abs().amax((1, 3)), FP8_MAX)


def spread_tiles(scales: Tensor, shape: torch.Size) -> Tensor:
    """Tile scales repeated to one per element of a matrix of this shape."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def round_fp8(value: Tensor) -> Tensor:
    """A float32 matrix with every value on its FP8 tile grid."""
    scale = spread_tiles(fp8_scales(value), value.shape)
    return (value / scale).to(torch.float8_e4m3fn).float() * scale


def fp4_scales(value: Tensor) -> Tensor:
    """float32 [o, i / 32] row scales of a matrix [o, i]."""
    return power_of_two(value.unflatten(-1, (-1, 32)).abs().amax(-1), FP4_MAX)


def fp4_codes(value: Tensor, scales: Tensor) -> Tensor:
    """uint8 codes 0 .. 15 (bit 3 is the sign) of a matrix [o, i]."""
    x = (value.unflatten(-1, (-1, 32)) / scales[..., None]).flatten(-2)
    magnitude = torch.bucketize(x.abs(), _FP4_EDGES)
    return (magnitude + 8 * (x < 0)).to(torch.uint8)


def round_fp4(value: Tensor) -> Tensor:
    """A float32 matrix with every value on its FP4 row grid."""
    scales = fp4_scales(value)
    x = value.unflatten(-1, (-1, 32)) / scales[..., None]
    rounded = _FP4_VALUES[torch.bucketize(x.abs(), _FP4_EDGES)].copysign(x)
    return (rounded * scales[..., None]).flatten(-2)
