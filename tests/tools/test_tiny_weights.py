"""The training model, the rounding of its weights, and the exported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dsv4cli
from dsv4_quant.config import ModelConfig
from dsv4_quant.files.headers import read_header
from dsv4_quant.schema import Variant, tensors
from dsv4cli.model.transformer import Model
from tools.tiny.export import export
from tools.tiny.model import Tiny, Trace
from tools.tiny.numerics import Spread, mix_scores
from tools.tiny.rounding import round_fp4, round_fp8
from tools.tiny.shape import CONFIG
from tools.tiny.weights import initial, working

ASSET = Path(dsv4cli.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def masters() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    values = initial(5)
    for name, value in values.items():
        if "hc_" in name and name.endswith("fn"):
            values[name] = torch.randn_like(value) / 32
        elif name == "head.weight":
            values[name] = torch.randn_like(value) / 8
    return values


def test_the_asset_holds_exactly_the_official_tensors() -> None:
    header = read_header(ASSET)
    config = ModelConfig.from_dict(json.loads((ASSET / "config.json").read_text(encoding="utf-8")), str(ASSET))
    wanted = {t.name: (t.shape, t.dtype) for t in tensors(config, Variant(stages="mtp"))}
    assert {name: (tuple(t.shape), t.dtype) for name, t in header.tensors.items()} == wanted


def test_the_asset_is_at_most_12_megabytes() -> None:
    assert sum(f.stat().st_size for f in ASSET.iterdir()) <= 12_000_000


@pytest.mark.parametrize("rounding", [round_fp8, round_fp4])
def test_rounding_twice_is_rounding_once(rounding: object) -> None:
    assert callable(rounding)
    value = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    once = rounding(value)
    assert torch.equal(rounding(once), once)
    assert 0 < float((once - value).norm() / value.norm()) < 0.2
    assert torch.equal(once.to(torch.bfloat16).float(), once)


def test_the_runner_computes_what_was_trained(masters: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Exported weights in the project's Model give the logits of the training model on its rounded copies."""
    from dsv4_quant.files import open_source

    export(masters, tmp_path)
    source = open_source(tmp_path)
    ids = torch.randint(3, CONFIG["vocab_size"], (150,), generator=torch.Generator().manual_seed(2))
    model = Model.bind(source, numerics="plain")
    got = model.forward(ids, model.new_state(150), logits="all")
    with torch.no_grad():
        want = Tiny(CONFIG).logits(working(masters, rounded=True, dtype=torch.float32), ids[None])[0]
    assert float((got - want).norm() / want.norm()) < 1e-4
    source.close()


def test_gradients_reach_every_trained_weight(masters: dict[str, torch.Tensor]) -> None:
    model, trace = Tiny(CONFIG), Trace()
    model.teach = True
    leaves = working(masters, rounded=False, dtype=torch.float32)
    ids = torch.randint(3, CONFIG["vocab_size"], (2, 320), generator=torch.Generator().manual_seed(3))
    h = model.trunk(leaves, ids, trace)
    loss = model.top(leaves, h).square().sum() + model.draft(leaves, h, ids.roll(-1, 1), trace).square().sum()
    assert trace.index_loss is not None
    (loss + trace.index_loss).backward()
    silent = {n for n, w in leaves.items() if w.requires_grad and (w.grad is None or not w.grad.abs().sum())}
    assert silent == {"head.weight"}  # not asked here; everything else, the indexer included, was


def test_the_hand_written_gradients_are_right() -> None:
    torch.manual_seed(0)
    h, fn = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((5, 4, 8), (24, 32)))
    assert torch.autograd.gradcheck(lambda a, b: mix_scores(a, b, 1e-3), (h, fn))
    out, post, comb = (torch.rand(*s, dtype=torch.double, requires_grad=True) for s in ((5, 8), (4, 5), (4, 4, 5)))
    assert torch.autograd.gradcheck(Spread.apply, (h, out, post, comb))
