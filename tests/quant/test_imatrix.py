"""Importance matrices as files: both of llama.cpp's forms, files of other models, files that are none."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dsv4_quant.config import ModelConfig
from dsv4_quant.errors import CorruptFile, WrongUse
from dsv4_quant.files import open_source
from dsv4_quant.imatrix import Entry, Imatrix, WeightEnergy, write
from tests.quant.conftest import SMALL
from tests.support.synth import Checkpoint

QA, DOWN = "blk.0.attn_q_a.weight", "blk.1.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_dict(SMALL.config(), "small")


@pytest.fixture
def entries() -> dict[str, Entry]:
    """A matrix, and a stack of three of which nobody visited the second."""
    random = torch.Generator().manual_seed(1)
    return {QA: Entry(torch.rand(1, SMALL.hidden, generator=random), torch.tensor([7.0])),
            DOWN: Entry(torch.rand(3, SMALL.width, generator=random) * torch.tensor([[1.0], [0.0], [1.0]]),
                        torch.tensor([4.0, 0.0, 10.0]))}


@pytest.fixture
def file(entries: dict[str, Entry], tmp_path: Path) -> Path:
    path = tmp_path / "a.imatrix.gguf"
    write(path, entries, datasets=["one.txt", "two.txt"], chunks=9, chunk_size=512)
    return path


def as_llama(path: Path, tensors: Mapping[str, np.ndarray], kind: str = "imatrix") -> Path:
    """A file as llama-imatrix writes it, by the `gguf` package."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_legacy(path: Path, entries: Mapping[str, tuple[int, np.ndarray]], *, trailer: bool = True) -> Path:
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    if trailer:
        data += struct.pack("<ii", 12, 8) + b"wiki.txt"
    path.write_bytes(data)
    return path


def test_what_is_written_is_read(file: Path, entries: dict[str, Entry], config: ModelConfig) -> None:
    found = Imatrix.open(file, config)
    assert set(found.entries) == set(entries)
    for name, entry in entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)
        assert torch.equal(found.entries[name].counts, entry.counts)
    assert found.keys == {"file": "a.imatrix.gguf", "dataset": "one.txt, two.txt", "entries_count": 2, "chunks_count": 9}
    assert found.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


def test_means_and_what_nobody_visited(file: Path, entries: dict[str, Entry]) -> None:
    found = Imatrix.open(file)
    for name, expert, wanted in ((QA, None, entries[QA].sums[0] / 7), (DOWN, 0, entries[DOWN].sums[0] / 4),
                                 (DOWN, 1, torch.ones(SMALL.width)), (DOWN, None, entries[DOWN].sums.sum(0) / 14)):
        got = found.for_tensor(name, expert)
        assert got is not None
        assert torch.equal(got, wanted)
    assert found.for_tensor("blk.0.attn_kv.weight", None) is None
    with pytest.raises(WrongUse, match=r"has 3 matrices of blk.1.ffn_down_exps.weight, but expert 3 was asked for"):
        found.for_tensor(DOWN, 3)


def test_the_gguf_package_reads_what_is_written(file: Path, entries: dict[str, Entry]) -> None:
    """Names, shapes and keys that llama.cpp's readers ask for."""
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"{name}.{part}" for name in entries for part in ("in_sum2", "counts")}
    for name, entry in entries.items():
        assert list(tensors[f"{name}.in_sum2"].shape) == [*reversed(entry.sums.shape)]
        assert list(tensors[f"{name}.counts"].shape) == [1, len(entry.counts)]
        assert np.array_equal(tensors[f"{name}.in_sum2"].data, entry.sums.numpy())
    said = {key: reader.fields[key].contents() for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count",
                                                           "imatrix.chunk_size")}
    assert said == {"general.type": "imatrix", "imatrix.datasets": ["one.txt", "two.txt"], "imatrix.chunk_count": 9,
                    "imatrix.chunk_size": 512}


def test_a_file_of_llama_imatrix(tmp_path: Path, config: ModelConfig) -> None:
    """ggml drops dimensions of 1, and calls a weight that it looks at differently so."""
    groups = np.arange(2 * 128, dtype=np.float32).reshape(2, 128)
    path = as_llama(tmp_path / "a.gguf", {
        f"{QA}.in_sum2": np.full(SMALL.hidden, 6, np.float32), f"{QA}.counts": np.array([3], np.float32),
        "blk.0.attn_output_a.weight (reshaped).in_sum2": groups[:, :128],
        "blk.0.attn_output_a.weight (reshaped).counts": np.array([[5], [5]], np.float32)})
    found = Imatrix.open(path)
    squared, grouped = found.for_tensor(QA, None), found.for_tensor("blk.0.attn_output_a.weight", None)
    assert squared is not None and grouped is not None  # noqa: PT018 - for the type checker
    assert torch.equal(squared, torch.full((SMALL.hidden,), 2.0))
    assert torch.allclose(grouped, torch.from_numpy(groups.sum(0) / 10))
    assert (found.datasets, found.chunks) == (["wiki.txt"], 3)


@pytest.mark.parametrize("trailer", [True, False])
def test_the_older_form(tmp_path: Path, config: ModelConfig, trailer: bool) -> None:
    means = np.random.default_rng(1).random((3, SMALL.width), dtype=np.float32)
    path = as_legacy(tmp_path / "a.dat", {QA: (4, np.full(SMALL.hidden, 8)), DOWN: (5, 5 * means)}, trailer=trailer)
    found = Imatrix.open(path, config)
    assert found.keys == {"file": "a.dat", "dataset": "wiki.txt" if trailer else "unknown", "entries_count": 2,
                          "chunks_count": 12 if trailer else 0}
    squared, down = found.for_tensor(QA, None), found.for_tensor(DOWN, 2)
    assert squared is not None and down is not None  # noqa: PT018
    assert torch.equal(squared, torch.full((SMALL.hidden,), 2.0))
    assert torch.allclose(down, torch.from_numpy(means[2]))


@pytest.mark.parametrize(("name", "shape", "sentence"), [
    (QA, (1, 64), "its blk.0.attn_q_a.weight is 1 x 64, this model's needs 1 x 128"),
    (DOWN, (8, 64), "its blk.1.ffn_down_exps.weight is 8 x 64, this model's needs 3 x 64"),
    (DOWN, (3, 128), "its blk.1.ffn_down_exps.weight is 3 x 128, this model's needs 3 x 64"),
    ("blk.0.ffn_gate.weight", (1, 128), "knows no tensor of this model; its first is blk.0.ffn_gate.weight"),
])
def test_a_file_of_another_model(tmp_path: Path, config: ModelConfig, name: str, shape: tuple[int, int], sentence: str) -> None:
    write(tmp_path / "a.gguf", {name: Entry(torch.ones(shape), torch.ones(shape[0]))}, datasets=[], chunks=1, chunk_size=1)
    with pytest.raises(WrongUse) as raised:
        Imatrix.open(tmp_path / "a.gguf", config)
    assert sentence in raised.value.message


def test_an_older_file_of_another_model(tmp_path: Path, config: ModelConfig) -> None:
    path = as_legacy(tmp_path / "a.dat", {DOWN: (1, np.ones(8 * SMALL.width))})
    with pytest.raises(WrongUse, match="is 1 x 512, this model's needs 3 x 64"):
        Imatrix.open(path, config)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(CorruptFile, match="cannot be read"):
        Imatrix.open(path)
    for content in (b"", b"abc", b"nothing of the kind, only words", struct.pack("<i", 0), struct.pack("<iii", 1, 1 << 30, 0),
                    struct.pack("<i", 1) + struct.pack("<i1sii", 1, b"a", 1, -5)):
        path.write_bytes(content)
        with pytest.raises(CorruptFile):
            Imatrix.open(path)
    with pytest.raises(CorruptFile, match="but no imatrix: its type is 'model'"):
        Imatrix.open(as_llama(tmp_path / "b.gguf", {}, kind="model"))


@pytest.mark.parametrize(("sums", "counts", "sentence"), [
    (np.array([[1, np.nan]], np.float32), np.ones((1, 1), np.float32), "negative or no numbers"),
    (np.array([[1, -1]], np.float32), np.ones((1, 1), np.float32), "negative or no numbers"),
    (np.ones((1, 2), np.float32), np.array([[-1]], np.float32), "was met -1.0 times"),
    (np.ones((2, 2), np.float32), np.ones((3, 1), np.float32), "2 rows of sums, but 3 counts"),
    (np.ones((2, 2), np.float16), np.ones((2, 1), np.float32), "is f16, not f32"),
    (np.ones((2, 2), np.float32), None, "counts is absent"),
])
def test_values_that_cannot_be(tmp_path: Path, sums: np.ndarray, counts: np.ndarray | None, sentence: str) -> None:
    tensors = {f"{QA}.in_sum2": sums, **({} if counts is None else {f"{QA}.counts": counts})}
    with pytest.raises(CorruptFile) as raised:
        Imatrix.open(as_llama(tmp_path / "a.gguf", tensors))
    assert sentence in raised.value.message


def test_no_truncated_file_is_believed(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    legacy = as_legacy(tmp_path / "a.dat", {QA: (4, np.ones(SMALL.hidden))}, trailer=False).read_bytes()
    for data in (whole, legacy):
        for length in range(0, len(data) - 4, max(1, len(data) // 60)):
            file.write_bytes(data[:length])
            with pytest.raises(CorruptFile):
                Imatrix.open(file)


def test_energy_of_the_weights(small: Checkpoint, folder: Path) -> None:
    energy = WeightEnergy(open_source(folder))
    dense = small.decoded["model.layers.0.self_attn.q_a_proj.weight"].square().mean(0)
    stack = small.decoded["model.layers.1.mlp.experts.down_proj"].square().mean(1)
    for name, expert, wanted in ((QA, None, dense), (DOWN, 2, stack[2]), (DOWN, None, stack.mean(0))):
        for _ in range(2):  # the second from memory
            got = energy.for_tensor(name, expert)
            assert got is not None
            assert torch.allclose(got, wanted, rtol=1e-5)
    assert energy.for_tensor(DOWN, 3) is energy.for_tensor("output_norm.weight", None) is None
    assert energy.keys["file"] == "none"
