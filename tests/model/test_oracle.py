"""Plain numerics against transformers' DeepseekV4ForCausalLM, float32, with the weights that the files decode to.

Where the indexer's k-th and next score are closer than float32 noise, two right implementations attend to different
entries. The seeds are such that the closest pair of any token is at least 1e-5 (of the mean score) apart.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_quant.files import open_source
from dsv4cli.model.transformer import Model
from tests.support.synth import Checkpoint, Shape, transformers_logits
from tests.support.tolerance import ORACLE, assert_close

LONG = {"hidden": 128, "width": 64, "index_topk": 64, "o_rank": 32, "heads": 2}

# name: shape, tokens, seed
CASES = {
    "flash: two window layers, then both compressors in turn": (Shape(), 400, 5),
    "pro: no window layer, more groups and heads, all layers hashed but one":
        (Shape(ratios=(128, 128, 4, 128), heads=8, o_groups=4, scaling=2.5, hash_layers=3, chosen=3), 500, 4),
    "base: FP8 experts and float32 scales": (Shape(base=True), 300, 5),
    "odd: two streams, five rounds, three heads in one group, no hash layer":
        (Shape(ratios=(4, 0), streams=2, rounds=5, hash_layers=0, heads=3, o_groups=1, head_dim=192), 300, 1),
    "clamped: a limit that bites, many experts, three shards, a drafting stage":
        (Shape(ratios=(0, 4), limit=.4, experts=16, chosen=6, shards=3, stages=1), 300, 1),
    "long: 2,200 tokens, 550 entries, 64 chosen": (Shape(ratios=(128, 4), **LONG), 2200, 7),
    "long: two indexers in turn": (Shape(ratios=(0, 4, 128, 4), **LONG), 2200, 6),
    "short: three tokens, no full group": (Shape(), 3, 2),
}


@pytest.mark.filterwarnings("default")  # theirs to mend
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_transformers(case: tuple[Shape, int, int], tmp_path: Path) -> None:
    shape, tokens, seed = case
    checkpoint = Checkpoint(shape, seed)
    ids = torch.randint(0, shape.vocab, (tokens,), generator=torch.Generator().manual_seed(seed))
    model = Model.bind(open_source(checkpoint.write(tmp_path)), numerics="plain")
    logits = model.forward(ids, model.new_state(tokens), logits="all")
    assert_close(logits, transformers_logits(checkpoint, ids), ORACLE)
