"""What tests of the encoders share: rows to encode, how much their columns matter, and what came of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsv4_quant.files.open import open_source
from dsv4_quant.formats import FORMATS

TINY = Path(__file__).parents[2] / "dsv4cli/assets/tiny"


def encode(name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    encoder = FORMATS[name].encode
    assert encoder is not None
    return encoder(rows, importance)


def decode(name: str, stored: Tensor) -> Tensor:
    return FORMATS[name].decode(stored, None)


def error(rows: Tensor, decoded: Tensor, importance: Tensor | None = None) -> float:
    """The weighted squared error, relative to the rows."""
    weights = torch.ones(1) if importance is None else importance
    return float((weights * (rows.double() - decoded) ** 2).sum() / (weights * rows.double() ** 2).sum())


@cache
def importance() -> Tensor:
    return torch.rand(4096, generator=torch.Generator().manual_seed(1)) + 0.1


@cache
def sample(kind: str, count: int) -> Tensor:
    """float32 rows: `count` Gaussian ones, or of heavy tails (Student's t, 3 degrees), or some of the tiny model."""
    random = torch.Generator().manual_seed(2)
    gaussian = torch.randn(count, 4096, generator=random) * 0.02
    if kind == "gaussian":
        return gaussian
    if kind == "heavy":
        return gaussian / torch.randn(3, count, 4096, generator=random).square().mean(0).sqrt()
    source = open_source(TINY)
    names = [f"layers.2.ffn.experts.{i}.{w}.weight" for i in (0, 5) for w in ("w1", "w2", "w3")] + ["embed.weight"]
    return torch.cat([source.read(name).float()[:100] for name in names])


def same_bits(ours: Tensor, theirs: np.ndarray) -> bool:
    """Equal to the sign of a zero; what is no number has any bits."""
    other = torch.from_numpy(theirs)
    bits = ours.view(torch.int32) == other.view(torch.int32)
    return bool((bits | (ours.isnan() & other.isnan())).all())
