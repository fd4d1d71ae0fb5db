"""What is measured of kernels: bytes over seconds, of weights that are no denormal numbers, and computed by kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch

from dsv4_kernels import backends, speeds
from dsv4_kernels.linear import Weight
from dsv4_kernels.native.weights import native
from dsv4_quant.formats import FORMATS, Packed

BUFFER = 40 << 20
native_only = pytest.mark.skipif(backends.cpu_trouble() is not None, reason="there are no kernels")


@pytest.fixture(scope="module")
def buffer() -> torch.Tensor:
    return speeds.random_bytes(BUFFER)


@pytest.mark.parametrize("format", speeds.MEASURED)
def test_every_format_is_read_from_the_same_bytes(format: str, buffer: torch.Tensor) -> None:
    matrix = speeds._matrix(buffer, format, 128, 256, 4096)
    assert matrix.shape == (128, 256)
    assert native(matrix) is not None
    if isinstance(matrix, Packed):
        assert matrix.data.data_ptr() == buffer.data_ptr() + 4096
        assert matrix.nbytes >= 128 * 256 * FORMATS[format].block_bytes // FORMATS[format].block
    values = matrix.float()
    assert values.isfinite().all()
    assert values[values != 0].abs().min() > torch.finfo(torch.float32).tiny


@native_only
def test_a_speed_is_bytes_over_seconds(buffer: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were each call to take two seconds; all calls are made, so that a format without a kernel fails."""
    counts = []

    def two_seconds(calls: Sequence[Callable[[], torch.Tensor]]) -> float:
        counts.append(len(calls))
        assert all(call().shape[0] == 1 for call in calls)
        return 2.0

    monkeypatch.setattr(speeds, "_seconds", two_seconds)
    q8_0 = speeds.speed_of("q8_0", buffer)
    row = 2048 // 32 * 34
    assert q8_0 == (256 * row / 2, 4096 * row / 2, 6 * 3 * 1024 * row / 2)
    assert counts == [1, BUFFER // (4096 * row), -(-(BUFFER // (3 * 1024 * row)) // 6)]
    assert speeds.attention_speed() == 2 * 32 * 512 * (128 + 512) / 2
    assert speeds.index_speed() == 64 * 128 * 4096 / 2


def test_matrices_do_not_overlap(buffer: torch.Tensor) -> None:
    def places(matrices: Sequence[Weight]) -> list[int]:
        return [(matrix.data if isinstance(matrix, Packed) else matrix).data_ptr() for matrix in matrices]

    size = speeds._stored("mxfp4", 1024, 2048)
    experts = places([part for expert in speeds._experts(buffer, "mxfp4") for part in expert])
    assert len(experts) == 3 * (BUFFER // (3 * size))
    assert {after - before for before, after in pairwise(experts)} == {size}


def test_a_time_is_the_median_of_rounds_behind_one_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only calls move: those of the first round are slow, and so is one later."""
    clock, made = [0.0], [0]

    def call() -> None:
        made[0] += 1
        clock[0] += 0.005 if made[0] > 2 else 1.0
        clock[0] += 7.0 if made[0] == 4 else 0.0

    monkeypatch.setattr(speeds.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(speeds, "ROUNDS", 3)
    assert speeds._seconds([call, call]) == pytest.approx(0.005)
