"""`dsv4 pull NAME --quant RECIPE`: the bytes of pull and then quantize, with two shards of the checkpoint on the disk at most."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import pytest

from dsv4cli import paths
from dsv4cli.registry import catalog, store
from dsv4cli.registry.streamed import Streamed
from tests.hub.conftest import REPO, assert_same, incoming, installed, shards
from tests.support import kills
from tests.support.hub import Fault, Hub
from tests.support.program import Outcome, environment
from tests.support.synth import Checkpoint, Shape
from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
Usage = namedtuple("Usage", "total used free")
MADE = f"{REPO}:q2"
GGUF = "test-model-Q2.gguf"
# Tensors in the order of the file, cut by number: weights are parted from their scales, and a layer's experts from each other.
SHAPE = Shape(ratios=(0, 4), hash_layers=1, q_rank=256, width=256, shards=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Checkpoint(SHAPE, seed=7).write(tmp_path_factory.mktemp("streamed") / "model")
    (folder / "README.md").write_text("a card\n")
    (folder / "LICENSE").write_text("MIT License\n")
    return folder


@pytest.fixture
def streaming(hub: Hub, checkpoint: Path) -> Hub:
    hub.publish(REPO, checkpoint)
    return hub


@pytest.fixture(scope="module")
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
                              env=environment(DSV4_HOME=str(models / "home"), HF_HOME=str(models / "hf")),
                              stdin=subprocess.DEVNULL)
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


def test_three_kills_and_the_same_bytes(streaming: Hub, expected: str, checkpoint: Path, tmp_path: Path) -> None:
    """The long form: python -m tests.support.kills 60 q2."""
    files = {GGUF: expected, **{name: digest(checkpoint / name) for name in ("README.md", "LICENSE")}}
    met = kills.survive(3, streaming, kills.quantised("q2", files), tmp_path / "models", seed=2)
    assert met["kills"] == 3
    assert met["installations, byte for byte the same"] >= 1


def test_what_was_made_is_a_model_like_others(run_dsv4: Run, streaming: Hub, checkpoint: Path) -> None:
    assert run_dsv4("pull", REPO, "--quant", "Q2", "--quiet").err == ""
    entry = catalog.resolve(MADE)
    assert (entry.path, entry.recipe, entry.context, entry.license) == (installed(MADE) / GGUF, "q2", 1048576, "MIT")
    (told,) = [entry for entry in json.loads(run_dsv4("list", "--json").out) if entry["name"] == MADE]
    assert (told["quant"], told["revision"]) == ("q2", streaming.branches[REPO, "main"])
    assert json.loads(run_dsv4("show", MADE, "--json").out)["layout"] == "gguf"
    assert "3 files" in run_dsv4("verify", MADE).err
    before = len(streaming.fetched())
    assert "The hub has no newer one" in run_dsv4("pull", REPO, "--quant", "q2").err
    assert "newest revision already" in run_dsv4("pull", REPO, "--quant", "q2", "--update").err
    assert len(streaming.fetched()) == before
    with entry.located().open("rb+") as file:
        file.seek(-100, 2)
        file.write(b"damaged!")
    refused = run_dsv4("verify", MADE, "--repair")
    assert (refused.code, f"dsv4 pull {REPO} --quant q2" in refused.err) == (1, True), refused.err
    assert run_dsv4("rm", MADE, "--yes").code == 0
    assert not installed(MADE).exists()


def test_known_models_have_names_for_it(run_dsv4: Run, streaming: Hub, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"flash": catalog.Entry("flash", repo=REPO, revision=streaming.branches[REPO, "main"], release="0731")}
    monkeypatch.setattr(catalog, "catalog", lambda: known)
    assert "dsv4 pull flash:q2" in run_dsv4("run", "flash:q2", "hello").err
    assert run_dsv4("pull", "flash:q2").code == 0
    entry = catalog.resolve("flash:q2")
    assert (entry.name, entry.release, entry.located().name) == ("flash:q2", "0731", "flash-Q2.gguf")
    assert digest(entry.located()) != expected  # of another release: its template is in the file
    assert catalog.resolve("flash").path is None


def test_the_source_can_stay(run_dsv4: Run, streaming: Hub, checkpoint: Path, expected: str) -> None:
    assert run_dsv4("pull", REPO, "--quant", "q2", "--keep-source").code == 0
    assert digest(installed(MADE) / GGUF) == expected
    assert_same(checkpoint)
    assert run_dsv4("rm", MADE, "--yes").code == 0
    before = len([path for path in streaming.fetched() if path.endswith(".safetensors")])
    again = run_dsv4("pull", REPO, "--quant", "q2", "--keep-source")  # of the shards that are here
    assert again.code == 0, again.err
    assert digest(installed(MADE) / GGUF) == expected
    fetched = [request for request in streaming.log if request.path.endswith(".safetensors") and request.method == "GET"]
    assert all(request.range for request in fetched[before:])  # their headers, to plan with
    assert_same(checkpoint)


def test_a_network_that_goes_away_costs_no_shard(run_dsv4: Run, streaming: Hub, expected: str) -> None:
    third = "model-00003-of-00005.safetensors"
    streaming.faults = [Fault(third, times=2), Fault(third, times=1, cut=100_000), Fault(third, cut=0)]
    failed = run_dsv4("pull", REPO, "--quant", "q2")
    assert (failed.code, "The hub ends" in failed.err or "broke" in failed.err) == (4, True), failed.err
    assert "kept" in failed.err
    assert [store.name_of(folder) for folder in store.unfinished()] == [MADE]
    left = [file.name for file in (incoming(MADE) / "source").glob("model-*")]
    assert "model-00001-of-00005.safetensors" not in left
    assert any(name.startswith(f"{third}.") and name.endswith(".part") for name in left)
    streaming.faults = []
    streaming.log.clear()
    assert run_dsv4("pull", REPO, "--quant", "q2").code == 0
    assert "model-00001-of-00005.safetensors" not in streaming.fetched()
    assert [request.range for request in streaming.log if request.path == third] == ["bytes=100000-"]
    assert digest(installed(MADE) / GGUF) == expected


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(run_dsv4: Run, streaming: Hub,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 4_500_000))
    refused = run_dsv4("pull", REPO, "--quant", "q2")
    assert refused.code == 3
    assert re.search(r"needs \d\.\d MB more while it is made, but the disk of .* has 4.5 MB free", refused.err), refused.err
    assert all(request.range for request in streaming.log if request.path.endswith(".safetensors") and request.method == "GET")


def test_a_disk_that_fills_up_in_the_middle(run_dsv4: Run, streaming: Hub, expected: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4200k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setenv("DSV4_MODELS", str(small))
        refused = run_dsv4("pull", REPO, "--quant", "q2")
        assert (refused.code, "more while it is made, but the disk of" in refused.err) == (3, True), refused.err
        with monkeypatch.context() as patched:  # somebody else took the space after the plan
            patched.setattr(Streamed, "check_disk", lambda self, peak: None)
            filled = run_dsv4("pull", REPO, "--quant", "q2")
        assert (filled.code, "is full" in filled.err) == (3, True), filled.err
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        assert run_dsv4("pull", REPO, "--quant", "q2").code == 0
        assert digest(installed(MADE) / GGUF) == expected
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)  # pytest may hold the maps of what failed


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["pull", REPO, "--quant", "q5"], 2, "There is no recipe called q5"),
    (["pull", "flash:q5"], 2, "There is no recipe called q5"),
    (["pull", "tiny", "--quant", "q2"], 2, "nothing to fetch"),
    (["pull", REPO, "--keep-source"], 2, "--keep-source goes with --quant"),
    (["pull", REPO, "--quant", "q2", "--include", "*"], 2, "--include without it"),
    (["pull", f"{REPO}:q2"], 4, f"dsv4 pull {REPO} --quant q2"),
])
def test_what_makes_no_sense_is_refused(run_dsv4: Run, streaming: Hub, arguments: list[str], code: int, said: str) -> None:
    done = run_dsv4(*arguments)
    assert (done.code, said in done.err) == (code, True), done.err
    assert streaming.fetched() == []


def test_it_asks_and_a_no_leaves_nothing(streaming: Hub) -> None:
    terminal = Terminal(["-m", "dsv4cli", "pull", REPO, "--quant", "q2"], columns=120,
                        env={"HF_ENDPOINT": streaming.address, "HF_HUB_OFFLINE": "0"})
    terminal.wait_for("5 of 5 shards")
    terminal.wait_for("They become one file of")
    terminal.wait_for("Fetch and quantise it? [Y/n]")
    terminal.type("n\r")
    assert terminal.wait_for_end() == 130
    assert not incoming(MADE).exists()
