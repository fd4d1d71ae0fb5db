"""Files of weights that change while they are mapped: a sentence and exit code 4, never a signal, never wrong logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4_kernels import backends
from dsv4_quant.errors import CorruptFile
from dsv4_quant.files import open_source
from dsv4cli.model.files import MappedFiles
from dsv4cli.model.transformer import Model
from tests.support.program import environment
from tests.support.synth import Checkpoint, Shape

watching = pytest.mark.skipif(sys.platform == "win32" or backends.cpu_trouble() is not None, reason="nobody watches here")

PROGRAM = """
import os, sys, time
import torch
from dsv4_quant.files import open_source
from dsv4cli import cli
from dsv4cli.model.transformer import Model

model = Model.bind(open_source(sys.argv[1]), expand_limit=0)
state = model.new_state(4000)
try:
    for token in range(4000):
        model.forward(torch.tensor([token % 500]), state)
        if token == 3:
            print("generating", flush=True)
    print("nobody noticed")
except BaseException as error:
    sys.exit(cli.explain(error))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Checkpoint(Shape(), seed=4).write(tmp_path / "model")


@pytest.fixture
def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@watching
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_that_is_cut_short_while_tokens_are_computed(folder: Path, weights: Path, kept: float) -> None:
    running = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment())
    assert running.stdout is not None
    assert running.stdout.readline() == "generating\n"
    size = weights.stat().st_size
    os.truncate(weights, int(kept * size))
    out, err = running.communicate(timeout=100)
    assert (running.returncode, out) == (4, "")
    assert f"{weights} was cut short while it was in use, from {size} bytes to {int(kept * size)}." in err


def test_a_file_that_is_written_to(folder: Path, weights: Path) -> None:
    model = Model.bind(open_source(folder), expand_limit=0)
    state = model.new_state(10)
    model.forward(torch.tensor([1]), state)
    with weights.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x" * 100)
    for _ in range(2):  # nor is it forgotten
        with pytest.raises(CorruptFile, match="was written to while it was in use"):
            model.forward(torch.tensor([1]), state)


def test_another_file_in_its_place_changes_nothing(folder: Path, weights: Path, tmp_path: Path) -> None:
    """As downloads and updates do it: a new file takes the name, and what is mapped stays until nobody maps it."""
    model = Model.bind(open_source(folder), expand_limit=0)
    before = model.forward(torch.tensor([1, 2]), model.new_state(10))
    other = tmp_path / "other"
    other.write_bytes(bytes(weights.stat().st_size))
    other.replace(weights)
    assert torch.equal(model.forward(torch.tensor([1, 2]), model.new_state(10)), before)
    weights.unlink()
    assert torch.equal(model.forward(torch.tensor([1, 2]), model.new_state(10)), before)


@watching
def test_expanded_weights_still_lie_in_their_file_in_part(folder: Path, weights: Path) -> None:
    """Norms are float32 there, and used where they are."""
    model = Model.bind(open_source(folder))
    os.truncate(weights, 0)
    with pytest.raises(CorruptFile, match="was cut short"):
        model.forward(torch.tensor([1, 2]), model.new_state(10))


@watching
def test_a_place_that_cannot_be_read_once_is_remembered(folder: Path, weights: Path) -> None:
    """As of a disk that fails for a moment: size and time of the file tell nothing of it."""
    before, page = weights.stat(), 4096
    files = MappedFiles(source := open_source(folder))
    files.demand_unchanged()
    mapped = source.maps()[weights]
    kept = bytes(weights.read_bytes())
    os.truncate(weights, 3 * page)
    assert mapped[10 * page].item() == 0  # would have been the end of this process
    weights.write_bytes(kept)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CorruptFile, match=f"could not be read from byte {10 * page} on"):
        files.demand_unchanged()
    assert bytes(mapped[: 3 * page].tolist()) == kept[: 3 * page]


@watching
def test_signals_of_other_maps_are_left_to_others(tmp_path: Path) -> None:
    """A process that never asked us to watch ends as it always would."""
    code = ("import os, sys\nfrom pathlib import Path\nfrom dsv4_kernels.native.faults import Watch\n"
            "from dsv4_quant.files.mapping import map_file\npath = Path(sys.argv[1])\npath.write_bytes(bytes(65536))\n"
            "ours, strange = map_file(path), map_file(path)\nwatch = Watch(ours)\nos.truncate(path, 0)\n"
            "print(ours[9999].item(), watch.lost(), flush=True)\nstrange[9999].item()\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, env=environment())
    assert done.stdout == "0 8192\n"
    assert done.returncode == -7


@watching
def test_a_file_that_is_cut_short_before_its_weights_are_bound(folder: Path, weights: Path) -> None:
    """The first that is read of them is what fingerprints a model."""
    code = ("import os, sys\nfrom dsv4cli import cli\nfrom dsv4cli.engine import opening\nwatch = opening.MappedFiles\n"
            "opening.MappedFiles = lambda source: (watch(source), os.truncate(sys.argv[2], 0))[0]\n"
            "cli.main(['eval', 'logits', sys.argv[1], '--ids', '-', '--out', '/dev/null'])")
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(weights)], input="1 2", capture_output=True, text=True,
                          env=environment(), timeout=100)
    assert (done.returncode, done.stdout) == (4, "")
    assert "was cut short while it was in use" in done.stderr


def test_a_file_that_is_emptied_before_it_is_mapped(folder: Path, weights: Path) -> None:
    source = open_source(folder)
    os.truncate(weights, 0)
    with pytest.raises(CorruptFile, match="is empty"):
        Model.bind(source)
