"""Foretold rates: what a token reads, against the model itself; what that takes, against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4_kernels import backends
from dsv4_kernels.native.build import BuildError
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import Header, read_header
from dsv4cli import Engine
from dsv4cli.engine import bench, machine, opening
from dsv4cli.engine.device import Place
from dsv4cli.engine.machine import Profile
from dsv4cli.engine.memory import MemoryPlan, plan_model
from dsv4cli.engine.rates import Costs, Work, cpu_costs, foretell, work_of
from dsv4cli.model import sizes
from dsv4cli.model.transformer import Model
from tests.engine.mock_model import byte_tokenizer_json
from tests.support.gguf_writer import Kind, write
from tests.support.synth import Checkpoint, Shape

SHAPE = Shape(ratios=(0, 4, 128, 4), experts=16, hidden=512, width=512, stages=1)
SPEEDS = {"cached": 90.0, "streamed": 50.0, "experts": 20.0}
PROFILE = Profile(100.0, 40.0, 10.0, None, None, None, "/models", "2026-01-02", None, {"q8_0": SPEEDS, "q4_k": SPEEDS}, 1000.0,
                  500.0, 0.25, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoint(SHAPE, seed=3).write(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def header(folder: Path) -> Header:
    return read_header(folder)


@pytest.mark.parametrize("depth", [0, 300, 5000])
def test_work_is_what_the_model_reads(folder: Path, header: Header, depth: int) -> None:
    """Up to small tensors, which the file stores in bf16 and the model holds in float32, and the token's embedding."""
    model = Model.bind(open_source(folder), expand_limit=0)
    assert work_of(header, depth, "official").nbytes == pytest.approx(bench.bytes_per_token(model, depth), rel=0.02)


def test_formats_have_the_names_of_their_kernels(folder: Path, header: Header, tmp_path: Path) -> None:
    official = work_of(header, 0, "official")
    assert set(official.chosen) == {"fp4"}
    assert set(official.dense) == {"fp8_e4m3", "bf16", "f32"}
    experts = sum(info.nbytes for info in header.by_role()["routed_expert"])
    assert official.chosen["fp4"] == experts * 2 // 16
    gguf = read_header(write(open_source(folder), tmp_path / "model.gguf", Kind.F32))
    assert set(work_of(gguf, 0, "official").dense) == {"f32"}


def test_attention_grows_with_the_context_until_entries_are_chosen(header: Header) -> None:
    """Two layers of ratio 4 that may look at 16 entries, one of 128; four windows of 128."""
    per_key = 2 * 4 * 128
    assert work_of(header, 0, "official").attended == per_key * 4
    assert work_of(header, 1279, "official").attended == per_key * (4 * 128 + 2 * 16 + 9)
    assert work_of(header, 40, "official").scored == 0
    assert work_of(header, 1280, "official").scored == 32 * 64 * 2 * 320


WORK = Work(2, {"q8_0": 1000}, {"q4_k": 240}, 100, 2000, 500)


def test_a_token_by_hand() -> None:
    costs = cpu_costs(WORK, PROFILE, 3, disk=10.0)
    assert costs is not None
    assert costs.dense == pytest.approx((1000 / 50 + 100 / 100 + 2000 / 1000 + 500 / 500) / 2)
    assert costs.near == pytest.approx(240 / 20 / 6)
    assert costs.far == pytest.approx(2 + 40 / 10)
    assert costs.layer(0, 2, 1, whole=False) == pytest.approx(0.25 + 12 + 2 * 2 + 6)
    assert costs.token == 0.5


def test_memory_bounds_what_kernels_can_do() -> None:
    slow = cpu_costs(WORK, replace(PROFILE, memory=10.0), 3)
    assert slow is not None
    assert (slow.near, slow.far) == (pytest.approx(240 / 10 / 6), pytest.approx(240 / 10 / 6))


@pytest.mark.parametrize("lacking", [{"kernels": {"q8_0": SPEEDS}}, {"memory": None}, {"attention": None}, {"layer_s": None}])
def test_what_was_not_measured_foretells_nothing(lacking: Mapping[str, object]) -> None:
    assert cpu_costs(WORK, replace(PROFILE, **lacking), 3) is None  # type: ignore[arg-type]


CARD = Costs(dense=1.0, shared=0.5, hit=0.1, near=2.0, far=9.0, lost=0.25, card=True, read=0.3, join=0.4)


def test_a_card_computes_beside_the_cpu() -> None:
    assert CARD.layer(6, 0, 0, whole=True) == pytest.approx(0.25 + 1 + 0.5 + 0.6)
    assert CARD.layer(4, 2, 0, whole=False) == pytest.approx(0.25 + 1 + 0.3 + 0.4 + 4)
    assert CARD.layer(4, 1, 1, whole=False) == pytest.approx(0.25 + 1 + 0.3 + 0.4 + 11)


def test_a_layer_that_is_not_whole_has_to_be_asked() -> None:
    """Even if nothing was missed, for only then it goes on; hidden behind what the card computes where that takes longer."""
    asked = replace(CARD, read=5.0)
    assert asked.layer(6, 0, 0, whole=False) == pytest.approx(0.25 + 1 + 5 + 0.4)
    assert CARD.layer(6, 0, 0, whole=False) == CARD.layer(6, 0, 0, whole=True)
    more = replace(CARD, parted=0.1, beside=0.05)
    assert more.layer(6, 0, 0, whole=False) == pytest.approx(0.25 + 0.1 + 1 + 0.05 + 0.5 + 0.6)
    assert more.layer(4, 2, 0, whole=False) == pytest.approx(0.1 + CARD.layer(4, 2, 0, whole=False))
    assert more.layer(6, 0, 0, whole=True) == CARD.layer(6, 0, 0, whole=True)


def measured(header: Header) -> Profile:
    work = work_of(header, 0, "official")
    kernels = {name: {"cached": 3e9, "streamed": 2e9, "experts": 1e9} for name in (*work.dense, *work.chosen)}
    return replace(PROFILE, kernels=kernels, memory=3e9, attention=1e9, index=1e9, sequential=4e8, random=1e8, layer_s=1e-4,
                   token_s=1e-4)


def planned(header: Header, available: int | None = None, cards: tuple[int, ...] = ()) -> MemoryPlan:
    return plan_model(header, "flash", ctx=8192, numerics="official", available=available, cards=cards)


def test_a_plan_is_foretold_from_a_full_context_to_an_empty_one(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "EXPAND_LIMIT", 0)
    told = foretell(header, planned(header), "official", measured(header))
    assert told.low is not None
    assert told.high is not None
    work, full = work_of(header, 0, "official"), work_of(header, 8191, "official")
    seconds = sum(work.dense.values()) / 2e9 + work.caches / 3e9 + work.attended / 1e9 + sum(work.chosen.values()) / 1e9 + 5e-4
    assert told.high == pytest.approx(1.15 / seconds)
    more = (full.caches - work.caches) / 3e9 + (full.attended - work.attended) / 1e9 + full.scored / 1e9
    assert told.low == pytest.approx(1 / (seconds + more) / 1.15)
    assert told.told().startswith(f"about {told.low:.0f} to {told.high:.0f} tok/s (by what dsv4 doctor --measure found on 2026")


def test_experts_on_the_disk_are_read_first(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them: at the disk's rate in order at best, at that for scattered pieces at worst."""
    monkeypatch.setattr(sizes, "EXPAND_LIMIT", 0)
    whole = planned(header)
    half = planned(header, whole.needed - whole.experts // 2)
    fast, slow = (foretell(header, plan, "official", measured(header)) for plan in (whole, half))
    assert fast.high is not None
    assert slow.high is not None
    work = work_of(header, 0, "official")
    assert 1.15 / slow.high - 1.15 / fast.high == pytest.approx(sum(work.chosen.values()) / 2 / 4e8, rel=1e-4)
    told = foretell(header, half, "official", replace(measured(header), sequential=None)).told()
    assert told == "not known: a rate that it needs could not be measured here"


def test_where_nothing_is_known_it_says_what_would_help(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "small" in foretell(header, planned(header), "official", PROFILE).told()
    monkeypatch.setattr(sizes, "EXPAND_LIMIT", 0)
    for profile in (None, replace(PROFILE, kernels={})):
        assert foretell(header, planned(header), "official", profile).told() == "not known: dsv4 doctor --measure would tell"
    assert "GPU" in foretell(header, planned(header, cards=(10**10,)), "official", PROFILE).told()


def test_an_opened_model_foretells_what_its_plan_does(folder: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "EXPAND_LIMIT", 0)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    machine.save(measured(header))
    engine = Engine.open(folder, ctx=512)
    assert engine.foretold == foretell(header, engine.plan, "official", measured(header))
    assert engine.foretold.low is not None


def test_fewer_threads_were_not_measured(folder: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor were kernels that cannot run."""
    source, place = open_source(folder), Place("cpu", "", replace(planned(header), expanded=0))
    machine.save(measured(header))
    monkeypatch.setattr(backends, "most_threads", lambda: 8)
    assert opening.rate_at(source, place, "official", 4).told() == "not known: the machine is measured with all its 8 cores"
    assert opening.rate_at(source, place, "official", 8) == opening.rate_at(source, place, "official", None)
    assert opening.rate_at(source, place, "official", None).low is not None
    monkeypatch.setattr(backends, "cpu_trouble", lambda: BuildError("No compiler.", "Install one."))
    assert "cannot run here" in opening.rate_at(source, place, "official", None).told()
