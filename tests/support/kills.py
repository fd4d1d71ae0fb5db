"""Pulls that are killed (SIGKILL) at random moments, and whether what is installed in the end is what it should be.

`python -m tests.support.kills 200` does so with a random checkpoint and prints what the kills met; with `q2` behind the number
the checkpoint is requantised while it comes. A pull that ends before its kill counts as an installation: it is
compared, removed, and the next one begins.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from tests.support.hub import Hub
from tests.support.program import environment

REPO = "test/model"
FOLDER = "test--model"
LONGEST = 1.3  # seconds from the first request of a pull to its kill; a whole pull takes about one
LONGEST_QUANTISED = 5.0  # torch is imported, and all is encoded


class Way(NamedTuple):
    """How to pull, and what is installed then."""

    options: tuple[str, ...]
    folder: str
    longest: float
    files: dict[str, str]  # SHA-256 by name


def as_published(published: Path) -> Way:
    files = {file.name: _digest(file) for file in published.iterdir() if file.is_file()}
    return Way(("--max-workers", "2", "--limit-rate", "3M"), FOLDER, LONGEST, files)


def quantised(recipe: str, files: dict[str, str]) -> Way:
    return Way(("--quant", recipe, "--limit-rate", "3M"), f"{FOLDER}+{recipe}", LONGEST_QUANTISED, files)


def survive(kills: int, hub: Hub, way: Way, models: Path, seed: int = 1) -> Counter[str]:
    """Kills so many pulls, lets the last one end, and compares after each installation; what was met, counted."""
    chance, met = random.Random(seed), Counter[str]()
    while met["kills"] < kills:
        if killed(hub, way, models, chance.uniform(0, way.longest)):
            met["kills"] += 1
            met[_left_behind(models, way)] += 1
        if (models / way.folder).exists():  # before the kill, or by it
            _compare(way, models, met)
    done = subprocess.run(_command(way), env=_environment(hub, models), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _compare(way, models, met)
    met["resumed requests"] = sum(1 for request in hub.log if request.range.endswith("-"))
    return met


def killed(hub: Hub, way: Way, models: Path, seconds: float) -> bool:
    """Starts a pull and kills it so many seconds after its first request; False if it had ended by then."""
    before = len(hub.log)
    process = subprocess.Popen(_command(way), env=_environment(hub, models), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(hub.log) == before and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode != 0


def _compare(way: Way, models: Path, met: Counter[str]) -> None:
    have = {file.name: _digest(file) for file in (models / way.folder).iterdir()}
    assert have.pop("manifest.json", "") != ""
    have.pop("journal.json", None)  # goes right after the rename
    assert have == way.files
    met["installations, byte for byte the same"] += 1
    shutil.rmtree(models)


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()


def _left_behind(models: Path, way: Way) -> str:
    incoming = models / "incoming" / way.folder
    if (models / way.folder).exists():
        return "killed after the rename"
    if (incoming / "manifest.json").exists():
        return "killed after the manifest"
    if list(incoming.glob("*.gguf.journal")):
        return f"killed while it was encoded, with {len(list((incoming / 'source').glob('model-*')))} shards or parts"
    if list(incoming.rglob("*.safetensors.*.part")):
        return "killed with parts"
    return "killed with verified files only" if list(incoming.rglob("journal.json")) else "killed before the first byte"


def _command(way: Way) -> list[str]:
    return [sys.executable, "-m", "dsv4cli", "pull", REPO, "--quiet", *way.options]


def _environment(hub: Hub, models: Path) -> dict[str, str]:
    return environment(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", DSV4_MODELS=str(models), DSV4_CACHE=str(models) + ".cache")


def _run(kills: int, recipe: str, seed: int, scratch: Path) -> Counter[str]:
    from tests.support.synth import Checkpoint, Shape

    checkpoint = Checkpoint(Shape(ratios=(0, 4), q_rank=256, width=256, shards=4), seed=3).write(scratch / "published")
    with Hub() as running:
        running.publish(REPO, checkpoint)
        way, models = as_published(checkpoint), scratch / "models"
        if recipe:
            for options in (["pull", REPO], ["quantize", REPO, "--recipe", recipe, "-o", str(scratch / "expected.gguf")]):
                command = [sys.executable, "-m", "dsv4cli", *options, "--quiet"]
                subprocess.run(command, env=_environment(running, models), check=True)
            shutil.rmtree(models)
            way = quantised(recipe, {f"{FOLDER.replace('--', '-')}-{recipe.upper()}.gguf": _digest(scratch / "expected.gguf")})
        return survive(kills, running, way, models, seed)


if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder + "/hf"
        counted = _run(int(sys.argv[1]), (*sys.argv, "")[2], int((*sys.argv, "", 1)[3] or 1), Path(folder))
    for what, count in sorted(counted.items()):
        print(f"{count:5} {what}")
    print(f"{time.monotonic() - began:5.0f} seconds")
