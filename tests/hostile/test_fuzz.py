"""Bytes of valid models changed or lost at random: what comes of it opens and can be read, or is refused with a QuantError."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsv4_quant.files import gguf_header
from tests.hostile.conftest import FIRST, INDEX, TRUNK, opens_or_is_refused

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INTERESTING = [0, 1, 7, 8, 9, 31, 34, 39, 57, 91, 93, 123, 125, 127, 128, 254, 255]

spots = st.integers(0, 2**20)  # taken modulo the length of what is spoiled
flips = st.lists(st.tuples(spots, st.sampled_from(INTERESTING) | st.integers(0, 255)), min_size=1, max_size=4)


def flipped(raw: bytes, header: int, changes: list[tuple[int, int]]) -> bytes:
    spoiled = bytearray(raw)
    for spot, value in changes:
        spoiled[spot % header] = value
    return bytes(spoiled)


def header_length(path: Path) -> int:
    """Bytes before the first tensor's."""
    if path.suffix == ".gguf":
        return min(info.offset for info in gguf_header.read(path).tensors.values())
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_the_valid_ones_are_valid(valid: Path, valid_gguf: Path) -> None:
    assert opens_or_is_refused(valid)
    assert opens_or_is_refused(valid_gguf)
    assert len(TRUNK) > 50


@FUZZ
@given(changes=flips)
def test_gguf_bytes_changed(changes: list[tuple[int, int]], valid_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(flipped(valid_gguf.read_bytes(), header_length(valid_gguf), changes))
    opens_or_is_refused(path)


@FUZZ
@given(number=st.integers(0, 2**64 - 1) | st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 32]), spot=spots)
@example(number=2**64 - 1, spot=8)
@example(number=2**64 - 1, spot=16)
def test_gguf_numbers_changed(number: int, spot: int, valid_gguf: Path, tmp_path: Path) -> None:
    """Eight bytes at a time, as counts, lengths and offsets have."""
    raw, at = valid_gguf.read_bytes(), spot % (header_length(valid_gguf) - 8)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:at] + struct.pack("<Q", number) + raw[at + 8 :])
    opens_or_is_refused(path)


@FUZZ
@given(start=spots, length=st.integers(1, 200))
def test_gguf_bytes_lost(start: int, length: int, valid_gguf: Path, tmp_path: Path) -> None:
    raw, start = valid_gguf.read_bytes(), start % header_length(valid_gguf)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:start] + raw[start + length :])
    opens_or_is_refused(path)


@FUZZ
@given(changes=flips)
def test_safetensors_bytes_changed(changes: list[tuple[int, int]], valid: Path, folder: Path) -> None:
    (folder / FIRST).write_bytes(flipped((valid / FIRST).read_bytes(), header_length(valid / FIRST), changes))
    opens_or_is_refused(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@FUZZ
@given(changes=flips, end=spots)
def test_json_bytes_changed(name: str, changes: list[tuple[int, int]], end: int, valid: Path, folder: Path) -> None:
    raw = (valid / name).read_bytes()
    (folder / name).write_bytes(flipped(raw, len(raw), changes))
    opens_or_is_refused(folder)
    (folder / name).write_bytes(raw[: end % len(raw)])
    assert not opens_or_is_refused(folder)


@FUZZ
@given(start=spots, length=st.integers(1, 200))
def test_safetensors_bytes_lost(start: int, length: int, valid: Path, folder: Path) -> None:
    raw = (valid / FIRST).read_bytes()
    start %= len(raw)
    (folder / FIRST).write_bytes(raw[:start] + raw[start + length :])
    assert not opens_or_is_refused(folder)
