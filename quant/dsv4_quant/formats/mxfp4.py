"""MXFP4 as GGUF stores it: 17 bytes for 32 elements, first the E8M0 scale, then element j low and j + 16 high."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_quant.formats import e8m0, fp4
from dsv4_quant.formats.base import Format
from dsv4_quant.formats.search import LEAST_WEIGHT, Scratch, by_pieces, importance_for

BLOCK, BLOCK_BYTES = 32, 17
EXPONENT, ONE_MORE = 0x7F800000, 1 << 23  # of a float32's bits: the exponent, and a step of it
SHIFT = 1.5 * 2**22  # a float32 of this size has no room for less than a half
EACH = 0x0101010101010101  # a one in each of eight bytes


def decode(rows: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, columns] of bytes [n, columns / 32 * 17]."""
    blocks = rows.unflatten(-1, (-1, BLOCK_BYTES))
    pairs = fp4.PAIRS.to(rows.device)[blocks[..., 1:].long()]  # [n, blocks, 16, (j, j + 16)]
    values = pairs.transpose(-1, -2).flatten(-2)
    return (values * e8m0.decode(blocks[..., :1].contiguous())).flatten(-2)


def from_fp4(rows: Tensor, scales: Tensor) -> Tensor:
    """Official FP4 rows [n, columns / 2] with E8M0 scales [n, columns / 32] as MXFP4 bytes: re-paired, nothing rounded."""
    blocks = fp4.codes(rows).unflatten(-1, (-1, BLOCK))
    pairs = blocks[..., :16] | (blocks[..., 16:] << 4)
    return torch.cat([scales.view(torch.uint8)[..., None], pairs], dim=-1).flatten(-2)


def encode(rows: Tensor, importance: Tensor | None) -> Tensor:
    """uint8 [n, columns / 32 * 17] of float rows [n, columns], columns a multiple of 32.

    Values of FP4 stay exact. Importance [columns] or [n, columns] weighs errors; ValueError if it has another shape.
    """
    importance = importance_for(rows, importance, BLOCK)
    shared = _weights(importance) if importance.dim() == 1 else None
    scratch = Scratch()

    def encode_blocks(blocks: Tensor, row: int) -> Tensor:
        scratch.give_back()
        count = blocks.numel() // rows.shape[1]
        weights = _weights(importance[row : row + count]) if shared is None else shared
        return _encode(blocks.view(count, -1, BLOCK), weights, scratch)

    return by_pieces(rows, BLOCK, BLOCK_BYTES, encode_blocks, light=True)


def _weights(importance: Tensor) -> Tensor:
    """float32 [..., blocks, 32] of importance [..., columns]: up to 1 in each block, and never nothing."""
    weights = importance.float().unflatten(-1, (-1, BLOCK))
    largest = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    return (weights / largest).clamp_min_(LEAST_WEIGHT)


def _encode(blocks: Tensor, weights: Tensor, scratch: Scratch) -> Tensor:
    """uint8 [blocks, 17] of float32 [rows, blocks of a row, 32], which lie as they lie in the rows: to turn them is slow.

    Of the smallest scale that holds the largest element and the half of it, the one with the lesser error.
    """
    numbers = scratch.take(blocks)
    largest = torch.abs(blocks, out=numbers).amax(-1, keepdim=True).view(torch.int32)
    scale = largest.add_(ONE_MORE // 2 - 1).bitwise_and_(EXPONENT)  # of the largest, one more beyond 1.5 times that
    scale = scale.clamp_(3 * ONE_MORE, 254 * ONE_MORE).sub_(3 * ONE_MORE)  # brings the largest to 6..12
    inverse = (254 * ONE_MORE - scale).view(torch.float32)
    torch.mul(blocks, inverse, out=numbers)
    wide = _gain(numbers, weights, scratch) < 0
    scale = scale.add_(wide * ONE_MORE) // ONE_MORE
    quarters = scratch.take(blocks, torch.int8).copy_(numbers.mul_(4 - 2 * wide.float()))
    return torch.cat([scale.to(torch.uint8).view(-1, 1), _pairs(quarters, scratch)], 1)


def _gain(numbers: Tensor, weights: Tensor, scratch: Scratch) -> Tensor:
    """float32 [..., 1] of [..., 32] within -12..12: how much more error twice FP4's values leave than FP4's values do."""
    shift, fine, coarse = scratch.take(numbers), scratch.take(numbers), scratch.take(numbers)
    # What has this added to it has no room for less than half of its own power of two, or than half of one.
    torch.bitwise_and(numbers.view(torch.int32), EXPONENT, out=shift.view(torch.int32))
    shift.clamp_(min=1.0).mul_(SHIFT)
    torch.add(numbers, shift, out=fine).sub_(shift).clamp_(-fp4.LARGEST, fp4.LARGEST)
    shift.clamp_(min=2 * SHIFT)
    torch.add(numbers, shift, out=coarse).sub_(shift)
    # (coarse - x)^2 - (fine - x)^2
    torch.sub(coarse, fine, out=shift)
    terms = coarse.add_(fine).sub_(numbers, alpha=2).mul_(shift).mul_(weights)
    return terms.sum(-1, keepdim=True)


def _pairs(quarters: Tensor, scratch: Scratch) -> Tensor:
    """uint8 [blocks, 16]: the codes of numbers given in quarters (cut off, int8 [..., 32] within -64..64), two a byte.

    A size's code is the least of three straight lines and 7. Eight bytes are computed as one int64; none of them carries.
    """
    sizes, line, codes = (scratch.take(quarters, torch.int8) for _ in range(3))
    torch.abs(quarters, out=sizes)
    eights = line.view(torch.int64)
    codes.fill_(7)
    for bit in range(3):  # steps of a half, of one, of two
        torch.add(sizes.view(torch.int64), EACH << bit, out=eights).bitwise_right_shift_(bit + 1)
        eights.bitwise_and_(EACH * (0x7F >> bit)).add_(EACH * 2 * bit)  # without the bits of the byte above
        torch.minimum(codes, line, out=codes)
    signs = quarters.view(torch.int64).bitwise_right_shift_(4).bitwise_and_(EACH * 8)
    pairs = codes.view(torch.int64).bitwise_or_(signs).flatten()
    high = torch.bitwise_left_shift(pairs, 4, out=eights.flatten())
    pairs[:-2] |= high[2:]  # element j + 16 above element j; of each block's four int64 the second two are of no use now
    return pairs.view(-1, 4)[:, :2].view(torch.uint8)


FORMAT = Format("mxfp4", BLOCK, BLOCK_BYTES, decode, encode=encode)
