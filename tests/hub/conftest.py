"""A hub on this machine that publishes a random checkpoint of four shards, and the real client pointed at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from dsv4cli import paths
from dsv4cli.registry import hub as client
from dsv4cli.registry import store
from tests.support.hub import Hub
from tests.support.program import Outcome, dsv4
from tests.support.synth import Checkpoint, Shape

REPO = "test/model"
SMALL = Shape(ratios=(0, 4), hash_layers=1, shards=4)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files: never changed by a test."""
    folder = Checkpoint(SMALL, seed=3).write(tmp_path_factory.mktemp("published") / "model")
    (folder / "README.md").write_text("a card\n")
    (folder / "inference").mkdir()
    (folder / "inference/model.py").write_text("pass\n")
    return folder


@pytest.fixture
def published(written: Path, tmp_path: Path) -> Path:
    """A copy of the published files that a test may change."""
    return shutil.copytree(written, tmp_path / "published")


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as running:
        running.publish(REPO, published)
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(client, "PAUSE", 0.01)
        monkeypatch.setattr(client, "TRIES", 6)
        monkeypatch.setattr(client, "QUIET", 5.0)
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def run_dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    return lambda *arguments, **options: dsv4(capsys, monkeypatch, *arguments, **options)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def installed(name: str = REPO) -> Path:
    return paths.models() / store.folder_name(name)


def incoming(name: str = REPO) -> Path:
    return paths.models() / store.INCOMING / store.folder_name(name)


def assert_same(published: Path, name: str = REPO) -> None:
    """The installed model is byte for byte what was published (without what a pull leaves out), and nothing is left over."""
    want = {file.name: file.read_bytes() for file in published.iterdir() if file.is_file()}
    have = {file.name: file.read_bytes() for file in installed(name).iterdir() if file.name != store.MANIFEST}
    assert have.keys() == want.keys()
    assert [path for path in want if have[path] != want[path]] == []
    assert not incoming(name).exists()
