"""A checkpoint that comes shard by shard, in any order and however its tensors are spread: the same bytes, and what it takes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dsv4_quant import recipe
from dsv4_quant.arriving import Arriving
from dsv4_quant.convert import Conversion, Halted
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.headers import Head, header_of_heads, read_head
from dsv4_quant.files.official import OfficialSource
from dsv4_quant.plan import Plan, make_plan
from dsv4_quant.spread import Spread
from tests.support.conversion import ORIGIN, digests, planned, written
from tests.support.synth import Checkpoint, Shape

SHAPE = Shape(ratios=(0, 4), hash_layers=1, q_rank=256, width=256, stages=1)
SHARDS = 4
# Where a tensor goes: by its name and number, of so many.
SPREADS: dict[str, Callable[[str, int, int], int]] = {
    "in order": lambda name, number, count: number * (SHARDS - 1) // count if not name.startswith("mtp.") else SHARDS - 1,
    "scales apart": lambda name, number, count: SHARDS - 1 if name.endswith(".scale") else number % (SHARDS - 1),
    "at random": lambda name, number, count: random.Random(name).randrange(SHARDS),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The checkpoint in one shard, and the digest of what is made of it."""
    scratch = tmp_path_factory.mktemp("whole")
    folder = Checkpoint(SHAPE, seed=11).write(scratch / "model")
    return folder, sha256(written(folder, scratch / "out.gguf", "q2").read_bytes()).hexdigest()


class Coming:
    """The checkpoint, cut into shards, on its way to a folder that has none of them yet."""

    def __init__(self, whole: Path, spread: str, scratch: Path) -> None:
        self.published, self.here = scratch / "published", scratch / "here"
        self.published.mkdir()
        self.here.mkdir()
        shutil.copy(whole / "config.json", self.here)
        tensors = load_file(whole / "model-00001-of-00001.safetensors")
        for shard in range(SHARDS):
            chosen = {name: tensor for number, (name, tensor) in enumerate(tensors.items())
                      if SPREADS[spread](name, number, len(tensors)) == shard}
            save_file(chosen, self.published / f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors")
        self.names = sorted(path.name for path in self.published.iterdir())
        self.sizes = {name: (self.published / name).stat().st_size for name in self.names}
        heads = {name: Head(read_head(self.bytes_of(name), size, name), size, f"digest of {name}")
                 for name, size in self.sizes.items()}
        self.plan: Plan = make_plan(header_of_heads(self.here, heads), scratch / "out.gguf", recipe.named("q2"), ORIGIN)
        self.source = OfficialSource(self.plan.source)
        self.kept = scratch / "kept"

    def bytes_of(self, name: str) -> Callable[[int, int], bytes]:
        return lambda start, length: (self.published / name).read_bytes()[start : start + length]

    def open(self, **options: bool) -> tuple[Conversion, Callable[[], Arriving]]:
        self.source = OfficialSource(self.plan.source)
        conversion = Conversion(self.plan, self.source, force=True, workers=2)
        return conversion, lambda: Arriving(conversion, self.source, self.sizes, self.kept, **options)

    def arrive(self, name: str) -> str:
        shutil.copy(self.published / name, self.here)
        return name

    def bytes_here(self) -> int:
        return sum(path.stat().st_size for folder in (self.here, self.kept) for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("spread", SPREADS)
def test_any_spread_and_order_make_the_same_bytes(spread: str, whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], spread, tmp_path)
    random.Random(spread).shuffle(coming.names)
    conversion, make = coming.open()
    with conversion:
        maker = make()
        assert maker.needs(coming.names[0]) or spread == "in order"
        for name in coming.names:
            if maker.needs(name):
                maker.take(coming.arrive(name))
            assert not (coming.here / name).exists()
        assert (maker.kept_bytes, conversion.done) == (0, conversion.total)
        conversion.finish()
    assert digests(coming.plan) == [whole[1]]
    assert coming.bytes_here() == 0


@pytest.mark.parametrize("spread", SPREADS)
def test_stopped_after_each_shard_it_needs_none_twice(spread: str, whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], spread, tmp_path)
    for name in coming.names:
        conversion, make = coming.open()
        with conversion:
            maker = make()
            if maker.needs(name):
                maker.take(coming.arrive(name))
            assert not maker.needs(name)
        coming.arrive(name)  # as if it had been killed before the shard was deleted
        conversion, make = coming.open()
        with conversion:
            make()
        assert not (coming.here / name).exists()
    conversion, make = coming.open()
    with conversion:
        conversion.finish()
    assert digests(coming.plan) == [whole[1]]


def test_halted_in_a_shard_it_goes_on_there(whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], "in order", tmp_path)
    conversion, make = coming.open()
    conversion.report = lambda done, total, name: conversion.halt()
    with conversion:
        maker = make()
        with pytest.raises(Halted):
            maker.take(coming.arrive(coming.names[0]))
        done = conversion.done
    assert (coming.here / coming.names[0]).exists()
    conversion, make = coming.open()
    with conversion:
        assert 0 < done <= conversion.done < conversion.total
        maker = make()
        for name in coming.names:
            if maker.needs(name):
                maker.take(coming.arrive(name))
        conversion.finish()
    assert digests(coming.plan) == [whole[1]]


def test_drafting_stages_are_not_asked_for(whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], "in order", tmp_path)
    conversion, make = coming.open()
    with conversion:
        maker = make()
        assert [maker.needs(name) for name in coming.names] == [True, True, True, False]


@pytest.mark.parametrize("spread", SPREADS)
def test_what_is_admitted_fits(spread: str, whole: tuple[Path, str], tmp_path: Path) -> None:
    """Shards that may arrive together leave the output and twice the largest as the bound, or come alone under the peak."""
    coming = Coming(whole[0], spread, tmp_path)
    spread_out = Spread(coming.plan.each_piece(), coming.source)
    needed = [name for name in coming.names if spread_out.kept(name) or any(name in one for one in spread_out.written)]
    largest = sorted(coming.sizes[name] for name in needed)[-2:]
    peak = spread_out.peak(coming.sizes)
    assert peak >= conversion_total(coming.plan) + sum(largest)
    conversion, make = coming.open()
    refused, most = 0, 0
    with conversion:
        maker, waiting = make(), list(needed)
        while waiting:
            pair = [waiting.pop(0)]
            assert maker.admits(pair[0])
            if waiting and maker.admits(waiting[0]):
                pair.append(waiting.pop(0))
            elif waiting:
                refused += 1
            for name in pair:
                coming.arrive(name)
            for name in pair:
                size = (coming.here / name).stat().st_size
                most = max(most, conversion.done + coming.bytes_here())
                maker.take(name)
                most = max(most, conversion.done + coming.bytes_here() + size)  # just before it went
        assert conversion.done == conversion.total
    slack = 4096 * SHARDS  # headers of what is kept
    assert most <= max(peak, conversion_total(coming.plan) + 2 * max(coming.sizes.values())) + slack
    assert (refused > 0) == (spread != "in order")


def conversion_total(plan: Plan) -> int:
    return sum(target.nbytes for target in plan.targets)


def test_a_shard_with_another_header_is_refused(whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], "in order", tmp_path)
    conversion, make = coming.open()
    with conversion:
        maker = make()
        shutil.copy(coming.published / coming.names[1], coming.here / coming.names[0])
        with pytest.raises(CorruptFile, match="another header"):
            maker.take(coming.names[0])


def test_the_same_plan_as_of_a_folder_that_is_here(whole: tuple[Path, str], tmp_path: Path) -> None:
    coming = Coming(whole[0], "at random", tmp_path)
    here = planned(whole[0], tmp_path / "other.gguf", "q2")
    assert coming.plan.targets == here.targets
    assert [part.head for part in coming.plan.parts] == [part.head for part in here.parts]
    assert coming.plan.fingerprint() != here.fingerprint()  # of other files
