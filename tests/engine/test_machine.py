"""Profiles of machines: kept per machine without torch, measured past the system's cache, refused where there is no room."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from dsv4_kernels import backends
from dsv4cli.engine import machine, measuring
from dsv4cli.engine.machine import Profile
from dsv4cli.errors import CapacityError
from tests.support.program import environment

PROFILE = Profile(20e9, 2e9, 5e8, None, 1, None, "/models", "2026-01-02")
ON_A_DISK = sys.platform == "linux" and os.major(Path(__file__).stat().st_dev) != 0  # 0: tmpfs, overlay, the network


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SAMPLE", 32 << 20)


def read_from_disks() -> int:
    """Bytes that storage delivered to this process."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["read_bytes"])


def test_a_profile_is_found_again_on_its_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.load() is None
    assert machine.save(PROFILE) == machine.profile_path()
    assert machine.load() == PROFILE
    newer = Profile(**{**vars(PROFILE), "memory": 30e9, "gpu": "a card"})
    machine.save(newer)
    assert machine.load() == newer
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert machine.load() is None


def test_a_profile_of_an_earlier_version_is_read_with_what_it_has() -> None:
    machine.save(PROFILE)
    said = json.loads(machine.profile_path().read_text())
    for name in ("vram", "kernels", "attention", "index", "layer_s", "token_s"):
        del said[name]
    machine.profile_path().write_text(json.dumps(said))
    assert machine.load() == PROFILE
    full = replace(PROFILE, vram=1e12, kernels={"q8_0": {"cached": 1.0, "streamed": 2.0, "experts": 3.0}}, layer_s=1e-4)
    machine.save(full)
    assert machine.load() == full


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000,
    json.dumps({"memory": 1.0}).encode(),
    *(json.dumps({**vars(PROFILE), **wrong}).encode() for wrong in (
        {"memory": "fast"}, {"memory": 0}, {"memory": -1.0}, {"memory": float("nan")}, {"memory": float("inf")}, {"memory": True},
        {"gpu": 1}, {"folder": None}, {"date": 2026}, {"more": 1}, {"layer_s": -1},
        {"kernels": []}, {"kernels": {"q8_0": 1.0}}, {"kernels": {"q8_0": {"cached": 1.0}}},
        {"kernels": {"q8_0": {"cached": 1.0, "streamed": 0, "experts": 1.0}}})),
])
def test_what_is_no_profile_counts_as_none(damage: bytes) -> None:
    machine.save(PROFILE)
    machine.profile_path().write_bytes(damage)
    assert machine.load() is None


def test_no_torch_is_needed_to_load() -> None:
    machine.save(PROFILE)
    code = "import sys; from dsv4cli.engine import machine; print(machine.load().sequential, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.split() == ["2000000000.0", "False"]


def test_each_piece_is_read_once_and_readers_wait_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, offsets, together = list[int](), range(0, 40 * 4096, 4096), Barrier(4, timeout=30)

    def disk(file: int, buffers: list[bytearray], offset: int) -> int:
        together.wait()  # breaks, and read_rate with it, unless four reads are under way at once
        time.sleep(0.01)
        seen.append(offset)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", disk)
    monkeypatch.setattr(measuring, "SECONDS", 60)
    rate = measuring.read_rate(0, offsets, 4096, readers=4)
    assert sorted(seen) == list(offsets)
    assert 0 < rate <= 4 * 4096 / 0.01


def test_a_slow_disk_is_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_disk(file: int, buffers: list[bytearray], offset: int) -> int:
        time.sleep(0.02)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", slow_disk)
    monkeypatch.setattr(measuring, "SECONDS", 0.1)
    began = time.perf_counter()
    rate = measuring.read_rate(0, range(100_000), 4096, readers=2)
    assert time.perf_counter() - began < 5
    assert 0 < rate <= 2 * 4096 / 0.02


@pytest.mark.skipif(not ON_A_DISK, reason="the checkout lies on no disk of its own, whose reads the system would count")
def test_disks_are_read_past_the_cache_and_left_as_they_were(small: None, request: pytest.FixtureRequest) -> None:
    assert request.config.cache is not None
    folder = Path(request.config.cache.mkdir("disk"))  # beside the checkout: tests' own folders may lie in memory
    before = read_from_disks()
    rates = measuring.disk_rates(folder)
    assert read_from_disks() - before >= 2 * measuring.SAMPLE  # once in order, once at random
    assert all(rate is not None and rate > 0 for rate in rates)
    assert list(folder.iterdir()) == []


def test_a_system_that_answers_from_memory_is_not_believed(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "uncached", lambda file: False)
    assert measuring.disk_rates(tmp_path) == (None, None)


def test_without_room_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "disk_rates", lambda folder: pytest.fail("it was measured"))
    monkeypatch.setattr(measuring, "available_memory", lambda: 10**9)
    with pytest.raises(CapacityError, match=r"2\.1 GB free in memory, but there are 1\.0 GB"):
        measuring.measure(tmp_path)
    monkeypatch.setattr(measuring, "SAMPLE", 1 << 60)
    with pytest.raises(CapacityError, match=r"TB free on the disk, but there are"):
        measuring.measure(tmp_path)


def test_copies_arrive_and_are_timed() -> None:
    source, target = torch.arange(1 << 20), torch.zeros(1 << 20, dtype=torch.int64)
    began = time.perf_counter()
    rate = measuring.copy_rate(target, source)
    assert torch.equal(target, source)
    assert rate > source.nbytes / (time.perf_counter() - began)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure_of_it() -> None:
    assert measuring.gpu_rates() == (None, None, None, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_links_have_rates_both_ways() -> None:
    name, to_gpu, from_gpu, vram = measuring.gpu_rates()
    assert name
    assert min(to_gpu or 0, from_gpu or 0, vram or 0) > 1e8


@pytest.mark.skipif(backends.cpu_trouble() is not None, reason="there are no kernels")
def test_kernels_of_the_formats_that_are_asked_for_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BUFFER", 32 << 20)
    monkeypatch.setattr(measuring, "TOKENS", 20)
    monkeypatch.setattr(measuring, "PASSES", 2)
    threads = torch.get_num_threads()
    found = measuring.with_kernels(PROFILE, ["q8_0", "mxfp4"])
    assert list(found.kernels) == ["q8_0", "mxfp4"]
    assert (found.sequential, found.date) == (PROFILE.sequential, PROFILE.date)
    assert all(1e8 < rate < 1e13 for speeds in found.kernels.values() for rate in speeds.values())
    assert 1e-6 < (found.layer_s or 0) < 0.1
    assert 0 < (found.token_s or 0) < 0.1
    assert min(found.attention or 0, found.index or 0, found.memory or 0) > 1e8
    assert torch.get_num_threads() == threads
    machine.save(found)
    assert machine.load() == found
