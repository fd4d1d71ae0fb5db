"""`dsv4 pull NAME --quant RECIPE`: the same bytes as pull and then quantize, with two shards of the checkpoint on the disk at most."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dsv4_quant.arriving import Arriving
from dsv4cli import paths
from dsv4cli.registry import catalog, store
from tests.hub.conftest import incoming, installed, shards
from tests.support.hub import Fault, Hub
from tests.support.program import Outcome, environment
from tests.support.synth import Checkpoint, Shape
from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
REPO = "test/stream"
MADE = f"{REPO}:q2"
GGUF = "test-stream-Q2.gguf"
# Tensors in the order of the file, cut by number: weights are parted from their scales, and a layer's experts from each other.
SHAPE = Shape(ratios=(0, 4), hash_layers=1, q_rank=256, width=256, shards=5)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Checkpoint(SHAPE, seed=7).write(tmp_path_factory.mktemp("streamed") / "model")
    (folder / "README.md").write_text("a card\n")
    (folder / "LICENSE").write_text("MIT License\n")
    return folder


@pytest.fixture
def streaming(hub: Hub, checkpoint: Path) -> Hub:
    hub.publish(REPO, checkpoint)
    return hub


@pytest.fixture(scope="session")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the GGUF that `dsv4 pull` and then `dsv4 quantize` make."""
    with pytest.MonkeyPatch.context() as patch, Hub() as running:
        models = tmp_path_factory.mktemp("pulled")
        patch.setenv("HF_ENDPOINT", running.address)
        patch.setenv("HF_HUB_OFFLINE", "0")
        running.publish(REPO, checkpoint)
        return pulled_then_quantised(models)


def pulled_then_quantised(models: Path) -> str:
    for command in (["pull", REPO], ["quantize", REPO, "--recipe", "q2", "-o", str(models / "out.gguf")]):
        done = subprocess.run([sys.executable, "-m", "dsv4cli", *command, "--quiet"], capture_output=True, text=True,
                              env=environment(DSV4_MODELS=str(models / "models")), stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
    return digest(models / "out.gguf")


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Measures the bytes that a folder takes on the disk, again and again; the most so far."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], on_disk(folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield most
    ended.set()
    watcher.join()


def on_disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob it bears that things go meanwhile
        for name in names:
            with suppress(FileNotFoundError):
                seen = os.lstat(os.path.join(place, name))
                total += min(seen.st_blocks * 512, -(-seen.st_size // 4096) * 4096)
    return total


def bound(checkpoint: Path, output: int) -> int:
    """The output and two shards; and the small files, with a block for each and for each shard's header and the journals."""
    small = sum(-(-file.stat().st_size // 4096) * 4096 for file in checkpoint.iterdir() if file.suffix != ".safetensors")
    sizes = sorted(shard.stat().st_size for shard in shards(checkpoint))
    heads = sum(8192 + int.from_bytes(shard.read_bytes()[:8], "little") for shard in shards(checkpoint))
    return output + sizes[-1] + sizes[-2] + 2 * small + heads + 8 * 4096


def test_the_same_bytes_with_two_shards_on_the_disk(run_dsv4: Run, streaming: Hub, checkpoint: Path, expected: str) -> None:
    streaming.faults = [Fault("safetensors$", slow=0.001)]
    with watched(paths.models()) as most:
        done = run_dsv4("pull", REPO, "--quant", "q2", "--yes")
    assert done.code == 0, done.err
    model = installed(MADE) / GGUF
    assert digest(model) == expected
    published = sum(shard.stat().st_size for shard in shards(checkpoint))
    limit = bound(checkpoint, model.stat().st_size)
    assert model.stat().st_size < most[0] <= limit < model.stat().st_size + published
    assert {file.name for file in installed(MADE).iterdir()} == {GGUF, store.MANIFEST, "README.md", "LICENSE"}
    assert not incoming(MADE).exists()
    whole = [request.path for request in streaming.log if request.method == "GET" and not request.range]
    assert sorted(path for path in whole if "safetensors" in path and "json" not in path) == [
        shard.name for shard in shards(checkpoint)]
