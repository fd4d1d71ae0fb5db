"""GGUF headers that lie about their keys and tensors, or are none."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.errors import CorruptFile, QuantError, UnsupportedModel
from dsv4_quant.files import gguf_header, open_source
from dsv4_quant.files.gguf_tokenizer import tokenizer_json
from dsv4_quant.files.headers import read_header
from tests.hostile.conftest import opens_or_is_refused, refused
from tests.hostile.forge import ARRAY, STRING, Gguf, array, text
from tests.support.program import environment

F32, Q8_0 = 0, 8
W = ("w", (32,), F32, 0)  # 128 bytes


def read(tmp_path: Path, forged: Gguf | bytes, error: type[QuantError] = CorruptFile) -> str:
    """The message of the error that reading must end in; it names the file and is fit for a terminal."""
    path = tmp_path / "lies.gguf"
    if isinstance(forged, bytes):
        path.write_bytes(forged)
    else:
        forged.write(path)
    with pytest.raises(error) as caught:
        gguf_header.read(path)
    message = caught.value.message
    assert str(path) in message
    assert caught.value.hint
    assert message.isprintable()
    assert len(message) < 1000
    return message


def key(kind: int, value: Any, name: str = "k") -> Gguf:
    return Gguf(keys=[(name, kind, value)])


def test_a_forged_file_can_be_right(tmp_path: Path) -> None:
    """Else everything below could be refused for a mistake of the forger's."""
    keys = [
        ("string", STRING, "x"), ("bool", 7, True), ("u64", 10, 2**64 - 1), ("f64", 12, 0.5),
        ("texts", ARRAY, array(STRING, 2, text("a") + text("b\xff"))), ("none", ARRAY, array(5, 0)),
        ("numbers", ARRAY, array(5, 2, struct.pack("<2i", -1, 7))),
    ]  # fmt: skip
    tensors = [("a", (32, 2), Q8_0, 0), ("b", (3,), F32, 96)]
    part = gguf_header.read(Gguf(keys=keys, tensors=tensors).write(tmp_path / "m.gguf"))
    assert part.metadata == {
        "string": "x", "bool": True, "u64": 2**64 - 1, "f64": 0.5, "texts": ["a", "b\xff"], "none": [], "numbers": [-1, 7],
    }  # fmt: skip
    found = {name: (info.dtype, info.shape, info.nbytes) for name, info in part.tensors.items()}
    assert found == {"a": ("q8_0", (2, 32), 68), "b": ("f32", (3,), 12)}
    assert part.tensors["b"].offset - part.tensors["a"].offset == 96


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes"),
        (b"GGUF", "has 4 bytes"),
        (b"GGUF" + bytes(19), "has 23 bytes"),
        (b"\x08\0\0\0\0\0\0\0{}" + bytes(32), "is not a GGUF"),
        (b"FUGG" + struct.pack("<IQQ", 3, 0, 0), "is not a GGUF: it begins with b'FUGG'"),
    ],
    ids=range(5),
)
def test_what_is_no_gguf(content: bytes, says: str, tmp_path: Path) -> None:
    assert says in read(tmp_path, content)


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24, 2**32 - 1])
def test_versions(version: int, tmp_path: Path) -> None:
    """3 << 24 is version 3 of a big-endian file."""
    assert f"GGUF version {version}" in read(tmp_path, Gguf(version=version), UnsupportedModel)


@pytest.mark.parametrize("count", [1000, 2**31, 2**63, 2**64 - 1])
def test_counts_that_do_not_fit(count: int, tmp_path: Path) -> None:
    assert f"{count} tensors" in read(tmp_path, Gguf(tensor_count=count))
    assert f"{count} keys" in read(tmp_path, Gguf(key_count=count))


def test_counts_that_are_wrong_by_one(tmp_path: Path) -> None:
    """What follows is then read as something else, and is nothing."""
    good = Gguf(keys=[("k", 4, 7)], tensors=[W])
    assert gguf_header.read(good.write(tmp_path / "m.gguf")).tensors["w"].nbytes == 128
    read(tmp_path, Gguf(keys=good.keys, tensors=good.tensors, key_count=2))
    read(tmp_path, Gguf(keys=good.keys, tensors=good.tensors, key_count=0))
    read(tmp_path, Gguf(keys=good.keys, tensors=good.tensors, tensor_count=2))


# ---- keys


@pytest.mark.parametrize("kind", [13, 255, 2**31, 2**32 - 1])
def test_kinds_of_values_that_do_not_exist(kind: int, tmp_path: Path) -> None:
    assert f"the value of k has type {kind}" in read(tmp_path, key(kind, b""))
    assert f"k is an array of type {kind}" in read(tmp_path, key(ARRAY, array(kind, 1)))


def test_arrays_of_arrays(tmp_path: Path) -> None:
    nested = array(ARRAY, 1) * 100_000
    assert "k is an array of type 9" in read(tmp_path, key(ARRAY, nested))


@pytest.mark.parametrize("length", [5000, 2**32, 2**63, 2**64 - 1])
def test_texts_longer_than_the_file(length: int, tmp_path: Path) -> None:
    claim = struct.pack("<Q", length)
    assert f"a text of {length} bytes" in read(tmp_path, key(STRING, claim))
    assert "a text of k" in read(tmp_path, key(ARRAY, array(STRING, 2, text("a") + claim)))
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + claim + bytes(100)
    assert f"a text of {length} bytes" in read(tmp_path, raw)


@pytest.mark.parametrize("inner", [0, 5, 7, STRING, 10])
@pytest.mark.parametrize("count", [5000, 1 << 24, 2**32, 2**61, 2**64 - 1])
def test_arrays_longer_than_the_file(count: int, inner: int, tmp_path: Path) -> None:
    """2^61 eight-byte entries are 0 bytes in 64 bits."""
    message = read(tmp_path, key(ARRAY, array(inner, count)))
    assert f"k has {count} entries" in message or f"k with {count} entries" in message


def test_texts_that_swallow_the_rest(tmp_path: Path) -> None:
    """An array whose last text ends with the file leaves no room for the tensors."""
    body = text("x" * 3000)
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("k") + struct.pack("<I", ARRAY) + array(STRING, 1, body)
    assert "a number at byte" in read(tmp_path, raw)


def test_a_key_twice(tmp_path: Path) -> None:
    assert "the key k occurs twice" in read(tmp_path, Gguf(keys=[("k", 4, 1), ("j", 4, 1), ("k", STRING, "2")]))


def test_keys_without_an_end(tmp_path: Path) -> None:
    """A text longer than any header, and room for it in the file: a hole, that takes none on the disk."""
    claim = gguf_header.LARGEST_HEADER
    raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + text("k") + struct.pack("<IQ", STRING, claim)
    path = tmp_path / "lies.gguf"
    path.write_bytes(raw)
    with path.open("r+b") as file:
        file.truncate(4 * claim)
    with pytest.raises(CorruptFile, match=f"a text of {claim} bytes .* the longest header has {claim - len(raw)} more"):
        gguf_header.read(path)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(4, 0), (4, 3), (4, 33), (4, 1 << 21), (10, 2**63), (5, -32), (6, 32.0), (STRING, "32"), (ARRAY, array(4, 0))],
)
def test_alignments_that_are_none(kind: int, value: Any, tmp_path: Path) -> None:
    assert "an alignment of" in read(tmp_path, key(kind, value, "general.alignment"))


# ---- tensors


def tensor(dimensions: tuple[int, ...] = (32,), kind: int = F32, offset: int = 0) -> Gguf:
    return Gguf(tensors=[("w", dimensions, kind, offset)])


@pytest.mark.parametrize("count", [0, 5, 255, 2**31, 2**32 - 1])
def test_numbers_of_dimensions(count: int, tmp_path: Path) -> None:
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("w") + struct.pack("<I", count) + bytes(400)
    assert f"w has {count} dimensions" in read(tmp_path, raw)


@pytest.mark.parametrize("dimensions", [(0,), (32, 0), (0, 32, 2), (0, 2**63)])
def test_dimensions_of_nothing(dimensions: tuple[int, ...], tmp_path: Path) -> None:
    assert "w has the shape" in read(tmp_path, tensor(dimensions))


@pytest.mark.parametrize(
    "dimensions", [(2000,), (2**62,), (2**64 - 1,), (2**32, 2**32), (2**31, 2**31, 4), (2**63, 2**63, 2**63, 2**63)]
)
def test_dimensions_larger_than_the_file(dimensions: tuple[int, ...], tmp_path: Path) -> None:
    """Among them products that are 0 in 64 bits."""
    message = read(tmp_path, tensor(dimensions))
    assert "w ends at byte" in message
    nbytes = 4
    for size in dimensions:
        nbytes *= size
    found = int(message.split("ends at byte ")[1].split(",")[0])
    assert 0 < found - nbytes < 200  # what precedes the data


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 31, 36, 41, 1000, 2**32 - 1])
def test_types_that_do_not_exist(kind: int, tmp_path: Path) -> None:
    assert f"w has ggml type {kind}" in read(tmp_path, tensor(kind=kind), UnsupportedModel)


@pytest.mark.parametrize(("dimensions", "kind"), [((31,), Q8_0), ((16, 2), Q8_0), ((128,), 12), ((33, 32), 39)])
def test_rows_that_are_no_whole_blocks(dimensions: tuple[int, ...], kind: int, tmp_path: Path) -> None:
    """16 x 2 has as many elements as a block, but no row of them."""
    assert f"rows of w have {dimensions[0]} elements" in read(tmp_path, tensor(dimensions, kind))


@pytest.mark.parametrize("offset", [1, 16, 31, 33, 2**64 - 1])
def test_offsets_that_are_not_aligned(offset: int, tmp_path: Path) -> None:
    assert f"w lies at {offset}, not a multiple of 32" in read(tmp_path, tensor(offset=offset))


@pytest.mark.parametrize("offset", [4096, 2**40, 2**63, 2**64 - 32])
def test_offsets_past_the_end(offset: int, tmp_path: Path) -> None:
    assert "w ends at byte" in read(tmp_path, tensor(offset=offset))


@pytest.mark.parametrize("other", [("v", (32,), F32, 0), ("v", (8,), F32, 32), ("v", (1,), F32, 96), ("v", (64,), F32, 0)])
def test_tensors_that_overlap(other: tuple[str, tuple[int, ...], int, int], tmp_path: Path) -> None:
    assert "inside" in read(tmp_path, Gguf(tensors=[W, other]))
    assert "inside" in read(tmp_path, Gguf(tensors=[other, W]))


def test_a_tensor_twice(tmp_path: Path) -> None:
    assert "w occurs twice" in read(tmp_path, Gguf(tensors=[W, ("w", (32,), F32, 128)]))


def test_cut_anywhere(tmp_path: Path) -> None:
    keys = [("k", STRING, "text"), ("a", ARRAY, array(STRING, 2, text("a") + text("b"))), ("n", 10, 7)]
    whole = Gguf(keys=keys, tensors=[W, ("v", (2, 3), F32, 128)], data=bytes(152)).write(tmp_path / "m.gguf").read_bytes()
    for length in range(len(whole)):
        read(tmp_path, whole[:length])


@pytest.mark.parametrize(
    "name", [b"\x1b[2J\x1b[1;31mw", b"w\r\nok", "\u202ew".encode(), b"\xff\xfe", b"\0", b"", b"w" * 2_000_000]
)
def test_names_are_made_safe_for_the_terminal(name: Any, tmp_path: Path) -> None:
    read(tmp_path, Gguf(tensors=[(name, (32,), 1000, 0)]), UnsupportedModel)
    read(tmp_path, Gguf(keys=[(name, 4, 1), (name, 4, 1)]))


# ---- the whole model


def test_the_valid_file_cut(valid_gguf: Path, tmp_path: Path) -> None:
    whole = valid_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in {*range(0, len(whole), 4001), len(whole) - 33, len(whole) // 2 * 2 - 64}:
        path.write_bytes(whole[:length])
        refused(path)


def test_trailing_bytes_are_no_harm(valid_gguf: Path, tmp_path: Path) -> None:
    """Writers pad the last tensor or not."""
    path = tmp_path / "long.gguf"
    path.write_bytes(valid_gguf.read_bytes() + bytes(100))
    assert opens_or_is_refused(path)


@pytest.mark.parametrize(
    "name",
    ["layers.0.ffn.experts.2.w1.weight", "layers.0.ffn.experts.-1.w1.weight", "layers.9.attn.wkv.weight", "mtp.0.attn.wkv.weight",
     "blk.0.attn.wkv.weight", "layers.0.ffn.experts.0.w4.weight", "layers.0.ffn.experts.0.w1", "layers.0", "embed", ""],
)  # fmt: skip
def test_names_that_are_not_there(name: str, valid_gguf: Path) -> None:
    """Two experts are: no number may lead outside their stack, and no stage to the trunk's layers."""
    source = open_source(valid_gguf)
    assert source.has("layers.0.ffn.experts.1.w1.weight")
    assert not source.has(name)
    with pytest.raises(CorruptFile, match="has no tensor for"):
        source.read(name)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (2, struct.pack("<H", 2), "is part of a model split into 2"),
        (10, 2**64 - 1, f"split into {2**64 - 1}"),
        (6, 2.0, "split.count is 2.0"),
        (STRING, "2", "split.count is '2'"),
        (ARRAY, array(4, 1, bytes(4)), "split.count is [0]"),
    ],
    ids=range(5),
)
def test_split_counts(kind: int, value: Any, says: str, tmp_path: Path) -> None:
    refused(key(kind, value, "split.count").write(tmp_path / "m.gguf"), says)


def test_a_split_of_very_many(tmp_path: Path) -> None:
    first = key(4, 99_999, "split.count").write(tmp_path / "m-00001-of-99999.gguf")
    refused(first, "lacks m-00002-of-99999.gguf", named="m-00002")


@pytest.mark.parametrize(
    ("name", "kind", "value", "says"),
    [
        ("tokens", 4, 7, "tokenizer.ggml.tokens is no list"),
        ("tokens", ARRAY, array(4, 2, bytes(8)), "tokenizer.ggml.tokens is no list"),
        ("merges", ARRAY, array(STRING, 1, text("ab")), "the merge 'ab' joins nothing"),
        ("merges", STRING, "a b", "tokenizer.ggml.merges is no list"),
        ("token_type", ARRAY, array(5, 1, bytes(4)), "tokenizer.ggml.token_type does not fit 2 tokens"),
        ("token_type", 5, 1, "tokenizer.ggml.token_type does not fit 2 tokens"),
    ],
    ids=range(6),
)
def test_tokenizer_keys(name: str, kind: int, value: Any, says: str, tmp_path: Path) -> None:
    keys = {
        "model": ("tokenizer.ggml.model", STRING, "gpt2"),
        "tokens": ("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("a") + text("b"))),
    }
    forged = Gguf(keys=[*(keys | {name: (f"tokenizer.ggml.{name}", kind, value)}).values()])
    metadata = gguf_header.read(forged.write(tmp_path / "m.gguf")).metadata
    with pytest.raises(CorruptFile) as caught:
        tokenizer_json(metadata, "m.gguf")
    assert says in caught.value.message


@pytest.mark.parametrize("first", [24, 30, 4096])
def test_a_header_longer_than_what_is_read_at_first(first: int, valid_gguf: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = gguf_header.read(valid_gguf), tmp_path / "cut.gguf"
    cut.write_bytes(valid_gguf.read_bytes()[:5000])
    monkeypatch.setattr(gguf_header, "FIRST_READ", first)
    assert gguf_header.read(valid_gguf) == whole
    with pytest.raises(CorruptFile, match="the file has"):
        gguf_header.read(cut)


def test_a_disk_that_fails_in_the_header(valid_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read fails with an error; what is mapped would fail with a signal."""
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error", str(valid_gguf))

    monkeypatch.setattr(Path, "open", lambda path, mode: Failing())
    with pytest.raises(CorruptFile, match="cannot be read: Input/output error") as caught:
        read_header(valid_gguf)
    assert "disk failed" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_a_header_needs_no_room_for_its_file(tmp_path: Path) -> None:
    """A file of 8 GB in an address space of 2."""
    forged = Gguf(tensors=[("w", (1 << 31,), F32, 0)])
    path = tmp_path / "large.gguf"
    forged.write(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 33))
    code = (f"import resource\nfrom pathlib import Path\nresource.setrlimit(resource.RLIMIT_AS, ({1 << 31}, {1 << 31}))\n"
            f"from dsv4_quant.files import gguf_header\nprint(len(gguf_header.read(Path({str(path)!r})).tensors))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
