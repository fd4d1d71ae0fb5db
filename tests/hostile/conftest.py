"""A valid checkpoint, as small as they get, in both layouts; and what it means to be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsv4_quant.errors import CorruptFile, QuantError, UnsupportedModel
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from tests.support.gguf_writer import Kind, write
from tests.support.synth import Checkpoint, Shape

SHAPE = Shape(
    ratios=(4, 0), hidden=32, width=32, experts=2, heads=2, head_dim=64, q_rank=32, o_groups=1, o_rank=32,
    index_heads=2, vocab=12, streams=2, shards=2,
)  # fmt: skip
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TRUNK = [name for name in Checkpoint(SHAPE, seed=0).official if not name.endswith(".scale")]  # names to read
TOKENIZER = {
    "model": {"vocab": {letter: i for i, letter in enumerate("abcdefgh", 2)}, "merges": ["a b"]},
    "added_tokens": [
        {"id": 0, "content": "<begin>", "special": True},
        {"id": 1, "content": "<end>", "special": True},
        {"id": 10, "content": "<think>", "special": False},
    ],
}


def refused(path: Path, *words: str, named: str | None = None) -> QuantError:
    """Asserts that `path` is refused by an error that names the file and says `words`, and is fit for a terminal."""
    with pytest.raises(QuantError) as caught:
        read_header(path)
    error = caught.value
    assert type(error) in (CorruptFile, UnsupportedModel)
    assert (named or path.name) in error.message
    for word in words:
        assert word in error.message
    assert error.hint
    assert error.message.isprintable()
    assert len(error.message) < 1000
    return error


def opens_or_is_refused(path: Path) -> bool:
    """Opens a model, reads every weight and the tokenizer; True if all went well, False if a QuantError says why not."""
    try:
        source = open_source(path)
        for name in read_header(path).tensors if source.layout == "official" else TRUNK:
            if not name.endswith(".scale"):
                source.read(name).float()
        source.tokenizer()
    except QuantError:
        return False
    return True



@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder: two shards, their index, a tokenizer. Not to be written to."""
    folder = Checkpoint(SHAPE, seed=1).write(tmp_path_factory.mktemp("valid"))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.fixture(scope="session")
def valid_gguf(valid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF. Not to be written to."""
    return write(open_source(valid), tmp_path_factory.mktemp("gguf") / "valid.gguf", Kind.Q8_0)


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint folder, to be spoiled."""
    return Path(shutil.copytree(valid, tmp_path / "model"))
