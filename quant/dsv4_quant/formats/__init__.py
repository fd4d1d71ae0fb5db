"""Number formats, one file each: what the bytes of a weight mean, exactly, in plain torch.

`Packed` is a weight as it lies in its file; `FORMATS` has every format by name.
"""

from __future__ import annotations

from dsv4_quant.formats.base import Format
from dsv4_quant.formats.packed import Packed
from dsv4_quant.formats.table import FORMATS

__all__ = ["FORMATS", "Format", "Packed"]
