"""The other block types of GGUF, decoded by the `gguf` package until they have a file of their own."""

from __future__ import annotations

from functools import partial

import gguf
import numpy as np
import torch
from torch import Tensor

from dsv4_quant.formats.base import Format


def _decode(kind: gguf.GGMLQuantizationType, rows: Tensor, scales: Tensor | None) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1]).contiguous().numpy()
    with np.errstate(all="ignore"):  # what is infinite or no number in the file is so here; nobody needs to be told
        values = torch.from_numpy(gguf.quants.dequantize(flat, kind))
    return values.reshape(*rows.shape[:-1], values.shape[-1])


def _supported() -> list[gguf.GGMLQuantizationType]:
    return [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


def _format(kind: gguf.GGMLQuantizationType) -> Format:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return Format(kind.name.lower(), block, block_bytes, partial(_decode, kind))


FORMATS = {kind.name.lower(): _format(kind) for kind in _supported()}
