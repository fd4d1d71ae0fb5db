"""A GGUF gives the logits of the checkpoint that it was written from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_quant.files import open_source
from dsv4cli.model.transformer import Model
from tests.support.gguf_writer import Kind, write
from tests.support.tolerance import RELATIVE, assert_close


@pytest.mark.usefixtures("on_reference")
@pytest.mark.parametrize("expand_limit", [0, 1 << 40])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_lossless_types_give_the_same_logits(kind: Kind, expand_limit: int, checkpoint: Path, ids: Tensor,
                                             tmp_path: Path) -> None:
    """FP8 and FP4 codes times powers of two are exact in bf16, so nothing may change."""
    official = open_source(checkpoint)
    other = open_source(write(official, tmp_path / "model.gguf", kind))
    assert other.layout == "gguf"
    logits = []
    for source in (official, other):
        model = Model.bind(source, numerics="plain", expand_limit=expand_limit)
        logits.append(model.forward(ids[:60], model.new_state(60), logits="all"))
    assert_close(logits[1], logits[0], RELATIVE[torch.float32])
