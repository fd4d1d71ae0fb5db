"""Pulls that are killed (SIGKILL) at random moments, and whether what is installed in the end is what was published.

`python -m tests.support.kills 200` does so with a random checkpoint and prints what the kills met. A pull that ends before
its kill counts as an installation: it is compared, removed, and the next one begins.
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
from pathlib import Path

from tests.support.hub import Hub
from tests.support.program import environment

REPO = "test/model"
FOLDER = "test--model"
LONGEST = 1.3  # seconds from the first request of a pull to its kill; a whole pull takes about one


def survive(kills: int, hub: Hub, published: Path, models: Path, seed: int = 1) -> Counter[str]:
    """Kills so many pulls, lets the last one end, and compares after each installation; what was met, counted."""
    chance, met = random.Random(seed), Counter[str]()
    while met["kills"] < kills:
        if killed(hub, models, chance.uniform(0, LONGEST)):
            met["kills"] += 1
            met[_left_behind(models)] += 1
        if (models / FOLDER).exists():  # before the kill, or by it
            _compare(published, models, met)
    done = subprocess.run(_command(), env=_environment(hub, models), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _compare(published, models, met)
    met["resumed requests"] = sum(1 for request in hub.log if request.range)
    return met


def killed(hub: Hub, models: Path, seconds: float) -> bool:
    """Starts a pull and kills it so many seconds after its first request; False if it had ended by then."""
    before = len(hub.log)
    process = subprocess.Popen(_command(), env=_environment(hub, models), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(hub.log) == before and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said.decode()
    return process.returncode != 0


def _compare(published: Path, models: Path, met: Counter[str]) -> None:
    want = {file.name: file.read_bytes() for file in published.iterdir() if file.is_file()}
    have = {file.name: file.read_bytes() for file in (models / FOLDER).iterdir()}
    assert (have.pop("manifest.json", b""), have.pop("journal.json", b"")) != (b"", b"")
    assert have == want
    met["installations, byte for byte the same"] += 1
    shutil.rmtree(models)


def _left_behind(models: Path) -> str:
    incoming = models / "incoming" / FOLDER
    if (models / FOLDER).exists():
        return "killed after the rename"
    if list(incoming.glob("*.part")):
        return "killed with parts"
    return "killed with verified files only" if (incoming / "journal.json").exists() else "killed before the first byte"


def _command() -> list[str]:
    return [sys.executable, "-m", "dsv4cli", "pull", REPO, "--quiet", "--max-workers", "2", "--limit-rate", "3M"]


def _environment(hub: Hub, models: Path) -> dict[str, str]:
    return environment(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0", DSV4_MODELS=str(models), DSV4_CACHE=str(models) + ".cache")


if __name__ == "__main__":
    from tests.support.synth import Checkpoint, Shape

    with tempfile.TemporaryDirectory() as scratch, Hub() as running:
        os.environ["HF_HOME"] = scratch + "/hf"
        checkpoint = Checkpoint(Shape(ratios=(0, 4), shards=4), seed=3).write(Path(scratch) / "published")
        running.publish(REPO, checkpoint)
        began = time.monotonic()
        counted = survive(int(sys.argv[1]), running, checkpoint, Path(scratch) / "models", int((*sys.argv, 1)[2]))
        for what, count in sorted(counted.items()):
            print(f"{count:5} {what}")
        print(f"{time.monotonic() - began:5.0f} seconds")
