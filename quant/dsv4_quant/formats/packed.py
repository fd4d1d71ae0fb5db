"""A weight as it lies in its file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsv4_quant.formats.base import Format
from dsv4_quant.formats.table import FORMATS

SMALL_FLOATS = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Packed:
    """A weight of logical `shape` ([n] or [out, in]) whose bytes are views of a mapped file.

    With `exact` whoever multiplies it may not round what it is multiplied with, as fast kernels otherwise do.
    `data` has a row for each of `out` (typed numbers, or uint8 blocks); `scale` is there for the official formats: FP8
    [ceil(out / 128), ceil(in / 128)], FP4 [out, in / 32], as E8M0 or F32.
    """

    format: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | None = None
    exact: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def float(self) -> Tensor:
        """float32 of `shape`: exactly the values that the bytes mean. Read only: what is stored so is the file itself."""
        data = self.data if self.shape else self.data[None]  # a scalar has no rows
        return self._format.decode(_pick(data, slice(None)), self._scales(slice(None))).reshape(self.shape)

    def to(self, device: torch.device | str) -> Packed:
        """The same bytes in a device's memory."""
        return replace(self, data=self.data.to(device), scale=None if self.scale is None else self.scale.to(device))

    def rows(self, index: Tensor | slice) -> Tensor:
        """float32 of the chosen rows only, as a look-up in an embedding wants them."""
        return self._format.decode(_pick(self.data, index), self._scales(index)).reshape(-1, *self.shape[1:])

    @property
    def _format(self) -> Format:
        return FORMATS[self.format]

    def _scales(self, index: Tensor | slice) -> Tensor | None:
        """A row of scales for each chosen row."""
        if self.scale is None:
            return None
        if self._format.scale_rows == 1:
            return _pick(self.scale, index)
        tile = torch.arange(self.shape[0], device=self.data.device)[index] // self._format.scale_rows
        return _pick(self.scale, tile)


def _pick(stored: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of stored numbers, small floats as raw bytes: torch can do little else with them."""
    return (stored.view(torch.uint8) if stored.dtype in SMALL_FLOATS else stored)[index]
