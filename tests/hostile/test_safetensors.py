"""Safetensors headers that lie about their tensors, or are none."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import safetensors_header

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HUGE = 1 << 62


def encode(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A file whose header (bytes are taken as they are) claims `length` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def shard(folder: Path, content: bytes) -> Path:
    path = folder / "lies.safetensors"
    path.write_bytes(content)
    return path


def read(folder: Path, content: bytes) -> str:
    """The message of the error that reading `content` must end in; it names the file and is fit for a terminal."""
    path = shard(folder, content)
    with pytest.raises(CorruptFile) as caught:
        safetensors_header.read(path)
    message = caught.value.message
    assert str(path) in message
    assert caught.value.hint
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes does not fit a file of 0"),
        (b"\x02", "0 bytes does not fit a file of 1"),
        (struct.pack("<Q", 2), "2 bytes does not fit a file of 8"),
        (encode({}, b"", length=3), "3 bytes does not fit a file of 10"),
        (encode({}, b"", length=2**63), f"{2**63} bytes"),
        (encode({}, b"", length=2**64 - 1), f"{2**64 - 1} bytes"),
        (encode(b"", b""), "not valid JSON"),
        (encode(b"{", b""), "not valid JSON"),
        (encode(b"\xff\xfe{}", b""), "not valid JSON"),
        (encode(b'{"a": ' * 200_000, b""), "not valid JSON"),
        (encode(b'{"a": ' + b"9" * 10_000 + b"}", b""), "not valid JSON"),
        (encode([GOOD]), "not a JSON object"),
        (encode(b'{"a": 1, "a": 2}'), "occurs twice"),
        (encode(json.dumps({"a": GOOD}).replace("}}", ', "shape": [4]}}').encode()), "occurs twice"),
    ],
    ids=range(14),
)
def test_what_is_no_header(content: bytes, says: str, tmp_path: Path) -> None:
    assert says in read(tmp_path, content)


def test_a_header_beyond_the_limit_is_not_even_read(tmp_path: Path) -> None:
    path = shard(tmp_path, struct.pack("<Q", 1 << 40))
    with path.open("r+b") as file:
        file.truncate(1 << 41)  # a hole: the file takes no room
    with pytest.raises(CorruptFile, match=f"header of {1 << 40} bytes does not fit a file of {1 << 41}"):
        safetensors_header.read(path)


@pytest.mark.parametrize(
    "entry",
    [None, 7, "F32", [], True, {}, {"dtype": "F32"}, {"shape": [2]}],
)
def test_entries_of_another_kind(entry: Any, tmp_path: Path) -> None:
    assert ": w " in read(tmp_path, encode({"w": entry}))


@pytest.mark.parametrize("dtype", [None, 4, "", "f32", "F31", "F32 ", ["F32"], {"F32": 1}, "U4", "x" * 10_000_000])
def test_types_that_do_not_exist(dtype: Any, tmp_path: Path) -> None:
    assert "w has the unknown type" in read(tmp_path, encode({"w": GOOD | {"dtype": dtype}}))


@pytest.mark.parametrize(
    "shape",
    [None, 4, "4", {}, [-4], [-2, -2], [2.0, 2], [True, 4], ["2", "2"], [[2, 2]], [None], [2**63], [1e300], [1] * 9,
     [1] * 100_000],
)
def test_shapes_that_are_none(shape: Any, tmp_path: Path) -> None:
    assert "w has the shape" in read(tmp_path, encode({"w": GOOD | {"shape": shape}}))


@pytest.mark.parametrize(
    "shape",
    [[4, 4], [3], [2, 2, 2], [0], [HUGE], [HUGE, HUGE, HUGE], [1 << 32, 1 << 32], [1 << 31, 1 << 31, 1]],
)
def test_shapes_that_need_other_bytes(shape: list[int], tmp_path: Path) -> None:
    """Among them products that are 0 in 64 bits."""
    message = read(tmp_path, encode({"w": GOOD | {"shape": shape}}))
    nbytes = 4
    for size in shape:
        nbytes *= size
    assert f"takes {nbytes} bytes, but has 16" in message


@pytest.mark.parametrize(
    "offsets",
    [None, 16, "0:16", {}, [], [0], [0, 8, 16], [-16, 0], [-1, 15], [16, 0], [0.0, 16.0], [False, 16], [0, 2**64], [0, "16"]],
)
def test_offsets_that_are_none(offsets: Any, tmp_path: Path) -> None:
    assert "w has the offsets" in read(tmp_path, encode({"w": GOOD | {"data_offsets": offsets}}))


@pytest.mark.parametrize(
    ("places", "size", "says"),
    [
        ({"a": [0, 16], "b": [8, 24]}, 24, "b begins at byte"),
        ({"a": [0, 16], "b": [0, 16]}, 32, "begins at byte"),
        ({"a": [0, 32], "b": [8, 24]}, 32, "inside a"),
        ({"a": [0, 16], "b": [16, 32]}, 31, "but the file has"),
        ({"a": [HUGE, HUGE + 16]}, 16, f"{HUGE + 16 + 8}"),
        ({"a": [0, 16], "b": [20, 36]}, 36, "cover 32 of 36"),
        ({"a": [4, 20]}, 20, "cover 16 of 20"),
        ({"a": [0, 16]}, 17, "cover 16 of 17"),
        ({}, 1, "cover 0 of 1"),
    ],
)
def test_places_that_overlap_or_leave_the_file(
    places: dict[str, list[int]], size: int, says: str, tmp_path: Path
) -> None:
    header = {
        name: {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}
        for name, offsets in places.items()
    }
    if says.isdigit():  # counted from the start of the file, whose header has this length
        says = str(int(says) + len(json.dumps(header)))
    assert says in read(tmp_path, encode(header, bytes(size)))


def test_scalars_and_empty_tensors_are_allowed(tmp_path: Path) -> None:
    """The format has them, although no DeepSeek-V4 does."""
    header = {
        "__metadata__": {"format": "pt"},
        "none": {"dtype": "BF16", "shape": [0, 5], "data_offsets": [4, 4]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    found = safetensors_header.read(shard(tmp_path, encode(header, bytes(4))))
    assert {name: (info.shape, info.nbytes) for name, info in found.items()} == {"none": ((0, 5), 0), "one": ((), 4)}


def test_cut_anywhere(tmp_path: Path) -> None:
    header = {"a": GOOD, "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}
    whole = encode(header, bytes(22))
    assert set(safetensors_header.read(shard(tmp_path, whole))) == {"a", "b"}
    for length in range(len(whole)):
        read(tmp_path, whole[:length])


@pytest.mark.parametrize("name", ["\x1b[2J\x1b[1;31mw", "w\r\nok", "\u202ew", "\ud800", "\x00", "w" * 5_000_000])
def test_names_are_made_safe_for_the_terminal(name: str, tmp_path: Path) -> None:
    assert "unknown type" in read(tmp_path, encode({name: GOOD | {"dtype": "F31"}}))
