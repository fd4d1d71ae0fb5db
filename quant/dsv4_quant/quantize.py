"""One piece of a tensor: read, checked, encoded, as the bytes that go into the file."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_quant.errors import CorruptFile, UnsupportedModel, WrongUse
from dsv4_quant.files import Source
from dsv4_quant.files.mapping import forget
from dsv4_quant.formats import FORMATS, Packed, e8m0, mxfp4
from dsv4_quant.plan import Piece, Target

NUMBERS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
WHOLE = ("i64", "i32")  # tables of numbers; IQ formats are weights
LARGEST_E8M0 = 252  # the largest scale byte with which every FP4 value is still a float32
# The tensor's GGUF name and the expert (None outside a stack) -> how much an error in each column matters, float32 [columns].
Lookup = Callable[[str, int | None], Tensor | None]


def no_importance(name: str, expert: int | None) -> None:
    """Every column matters alike."""


def encode_piece(source: Source, piece: Piece, importance: Lookup = no_importance, device: str = "cpu") -> Tensor:
    """uint8 [bytes] of the piece.

    What is stored in the wanted type, or in an official one that means the same, is copied or re-paired and never rounded. Raises
    CorruptFile for NaN and infinity in the source, WrongUse for values beyond the type, UnsupportedModel where it has no encoder.
    """
    target, rows = piece.target, slice(piece.first, piece.first + piece.rows)
    packed = [source.read(name) for name in officials(piece)]
    if len(packed) == 1 and (copied := _copied(packed[0], rows, piece, source)) is not None:
        encoded = copied
    else:
        values = torch.cat([_floats(weight, rows) for weight in packed], dim=-1)
        _check_finite(values, piece, source)
        matters = importance(target.name, _expert(piece)) if target.weighed else None
        encoded = _encoded(values.to(device), target, matters).cpu()
    for weight in packed:
        forget(_rows(weight, rows))
        if weight.format == "fp4" and weight.scale is not None:  # a row of scales each; FP8's tiles are read again
            forget(weight.scale[rows])
    found = encoded.contiguous().view(torch.uint8).flatten()
    assert found.numel() == piece.nbytes, f"{target.name}: {found.numel()} bytes instead of {piece.nbytes}"
    return found


def officials(piece: Piece) -> tuple[str, ...]:
    """The official tensors that the piece needs: one of a stack, or all that lie side by side."""
    names = piece.target.official
    return (names[piece.expert],) if piece.target.experts > 1 or len(piece.target.shape) == 3 else names


def _expert(piece: Piece) -> int | None:
    return piece.expert if len(piece.target.shape) == 3 else None


def _copied(weight: Packed, rows: slice, piece: Piece, source: Source) -> Tensor | None:
    """The stored rows, where they are or mean exactly what is wanted; None where they have to be computed."""
    stored = _rows(weight, rows)
    if weight.format == piece.target.type:
        if weight.format not in WHOLE:
            _check_finite(FORMATS[weight.format].decode(stored, None), piece, source)
        return stored.clone()  # the map's own pages are let go before the bytes are written
    if weight.format == "fp4" and piece.target.type == "mxfp4" and weight.scale is not None:
        scales = weight.scale[rows] if weight.scale.dtype == torch.float32 else weight.scale.view(torch.uint8)[rows]
        if scales.dtype == torch.float32:
            kept = e8m0.encode(scales)
            if not torch.equal(e8m0.decode(kept), scales):
                return None  # no powers of two: not MXFP4's
            scales = kept.view(torch.uint8)
        if int(scales.max()) > LARGEST_E8M0:
            _check_finite(_floats(weight, rows), piece, source)
        return mxfp4.from_fp4(stored, scales)
    return None


def _rows(weight: Packed, rows: slice) -> Tensor:
    """The stored bytes or numbers of some rows; a vector is one row."""
    return weight.data[rows] if len(weight.shape) > 1 else weight.data.reshape(1, -1)


def _floats(weight: Packed, rows: slice) -> Tensor:
    """float32 [rows, columns]; whole numbers of a table stay what they are."""
    if weight.format in WHOLE:
        return _rows(weight, rows)
    return weight.rows(rows) if len(weight.shape) > 1 else weight.float().reshape(1, -1)


def _encoded(values: Tensor, target: Target, importance: Tensor | None) -> Tensor:
    if target.type in NUMBERS:
        return _numbers(values, target)
    encode = FORMATS[target.type].encode
    if encode is None:
        raise UnsupportedModel(f"{target.type} can be read but not written.", "Choose another type.")
    return encode(values, None if importance is None else importance.to(values.device))


def _numbers(values: Tensor, target: Target) -> Tensor:
    found = values.to(NUMBERS[target.type])
    if target.type != "f32" and not torch.equal(torch.isfinite(found.float()), torch.isfinite(values.float())):
        raise WrongUse(f"{target.name} has values that {target.type} cannot hold.", "Choose bf16 or f32 for it.")
    if target.type == "i32" and not torch.equal(found.to(values.dtype), values):
        raise WrongUse(f"{target.name} has numbers beyond 32 bits.", "The checkpoint is damaged; get it again.")
    return found


def _check_finite(values: Tensor, piece: Piece, source: Source) -> None:
    good = torch.isfinite(values)
    if bool(good.all()):
        return
    row, column = (int(index) for index in (~good).nonzero()[0])
    where = f"row {piece.first + row}, column {column}"
    raise CorruptFile(
        f"{source.path}: {', '.join(officials(piece))} holds {float(values[row, column])} in {where}.",
        "The checkpoint is damaged; get it again.",
    )
