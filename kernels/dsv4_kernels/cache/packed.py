"""Rows of official caches in the fewest bytes that lose nothing, in plain torch (spec/checkpoint.md section 3.14).

Rounding leaves codes of 8 or 4 bits and a power of two for each block, and rows of bytes are just these:

- K=V: a byte E4M3 for each value that is not rotated, a byte E8M0 for each 64 of them, then the rotated values in bf16,
  lower byte first. 583 bytes for Flash's 512 values.
- Index keys: a byte for two neighbours' E2M1 codes, the first in the lower half, then a byte E8M0 for each 32 values.
  68 bytes for 128 values.

A block with a value that is not finite gets the scale 255 and reads as NaN throughout. The Triton kernels write and read such
rows (cache/gpu.py); this is what `ref` does, and how a state goes from one form to the other. A row is one run of bytes, so that
rings, entries and snapshots stay tensors with a row for each key; rows of 583 bytes begin at odd addresses and are read byte by
byte, which costs instructions, not traffic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels.checks import demand_multiple
from dsv4_kernels.rounding import FP4, FP8, INDEX_BLOCK, KV_BLOCK, Code
from dsv4_kernels.rounding.ref import power_of_two_scale
from dsv4_quant.formats import e8m0, fp4

NAN = 255  # the E8M0 byte that is not a number


def kv_bytes(d: int, rotated: int) -> int:
    """Of a K=V row of d values, the last `rotated` of them in bf16. Raises ValueError where blocks do not fit."""
    demand_multiple("part before the rotated values", d - rotated, KV_BLOCK)
    return (d - rotated) + (d - rotated) // KV_BLOCK + 2 * rotated


def index_bytes(d: int) -> int:
    """Of an index key of d values. Raises ValueError when blocks do not fit them."""
    demand_multiple("last axis", d, INDEX_BLOCK)
    return d // 2 + d // INDEX_BLOCK


def pack_kv(x: Tensor, rotated: int) -> Tensor:
    """What `rounding.round_kv` left, x [n, d] of any float type -> uint8 [n, kv_bytes]; `unpack_kv` is the way back.

    Raises ValueError for values that were not rounded, which bytes could not hold, or where blocks do not fit d.
    """
    kv_bytes(x.shape[1], rotated)
    still, turned = x.split([x.shape[1] - rotated, rotated], 1)
    blocks, scales = _scaled(still, KV_BLOCK, FP8)
    codes = blocks.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    tail = turned.to(torch.bfloat16).contiguous().view(torch.uint8)
    rows = torch.cat([codes, scales, tail], 1)
    _demand_same(x, unpack_kv(rows, rotated))
    return rows


def unpack_kv(rows: Tensor, rotated: int) -> Tensor:
    """uint8 [n, kv_bytes(d, rotated)] -> float32 [n, d]; bf16 holds them too. Raises ValueError for other widths."""
    blocks = _blocks(rows.shape[1] - 2 * rotated, KV_BLOCK + 1)
    codes, scales, tail = rows.split([blocks * KV_BLOCK, blocks, 2 * rotated], 1)
    still = codes.view(torch.float8_e4m3fn).float().unflatten(1, (blocks, KV_BLOCK)) * e8m0.decode(scales)[..., None]
    # A copy, because bf16 cannot be seen at the odd addresses where a row's end may lie.
    turned = tail.flatten().clone().view(torch.bfloat16).float().view(len(rows), rotated)
    return torch.cat([still.flatten(1), turned], 1)


def pack_index(x: Tensor) -> Tensor:
    """What `rounding.round_index` left, x [n, d] of any float type -> uint8 [n, index_bytes]; `unpack_index` undoes it.

    Raises ValueError for values that were not rounded, or where blocks do not fit d.
    """
    index_bytes(x.shape[1])
    blocks, scales = _scaled(x, INDEX_BLOCK, FP4)
    codes = fp4.nearest(blocks).flatten(1)
    rows = torch.cat([codes[:, 0::2] | (codes[:, 1::2] << 4), scales], 1)
    _demand_same(x, unpack_index(rows))
    return rows


def unpack_index(rows: Tensor) -> Tensor:
    """uint8 [n, index_bytes(d)] -> float32 [n, d]; bf16 holds them too. Raises ValueError for other widths."""
    blocks = _blocks(rows.shape[1], INDEX_BLOCK // 2 + 1)
    codes, scales = rows.split([blocks * INDEX_BLOCK // 2, blocks], 1)
    return fp4.decode(codes, scales)


def _scaled(x: Tensor, block: int, code: Code) -> tuple[Tensor, Tensor]:
    """x [n, d] -> its blocks [n, d / block, block] over their scales, float32, and these as bytes [n, d / block].

    A rounded block may get half the scale that it was rounded with: then every code doubles and is one still.
    """
    blocks = x.float().unflatten(1, (-1, block))
    scale = power_of_two_scale(blocks.abs().amax(-1, keepdim=True), code)
    scales = e8m0.encode(scale).view(torch.uint8)
    scales.masked_fill_(~blocks.isfinite().all(-1, keepdim=True), NAN)
    return blocks / scale, scales[..., 0]


def _blocks(width: int, size: int) -> int:
    demand_multiple("bytes of a packed row's blocks", width, size)
    return width // size


def _demand_same(x: Tensor, kept: Tensor) -> None:
    """Raises ValueError unless `kept` is x where x is finite, or NaN, which its whole block then is."""
    lost = (kept.double() != x.double()) & x.isfinite() & ~kept.isnan()
    if lost.any():
        raise ValueError(f"{int(lost.sum())} of {x.numel()} values were not rounded before they were packed")
