"""Measures a machine: bandwidths of memory, a disk in order and at random, a GPU and the link to it; and what our kernels make of
them, format by format. Takes some twenty seconds.

The disk is asked for a file of random bytes that was written past the system's cache a moment ago and has no name, so
that nothing is left behind whoever kills the program, and models stay in the cache. What a drive, or the host of a
virtual machine, keeps in a cache of its own is not seen from here.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dsv4_kernels import backends, speeds
from dsv4_quant.files import open_source
from dsv4cli.console import in_bytes
from dsv4cli.engine.machine import Profile
from dsv4cli.engine.memory import available_memory
from dsv4cli.errors import CapacityError
from dsv4cli.model.transformer import Model
from dsv4cli.registry import catalog

SAMPLE = 1 << 30  # bytes of the file
PIECE = 8 << 20  # of a read in order
TOUCHED = 128 << 10  # of a read at random: what Linux, unless told otherwise, reads around a mapped page that it lacks
SECONDS = 3.0  # after which a slow disk has been read enough
LINKED = 256 << 20  # bytes of a copy to or from a GPU
COPIES = 5
BUFFER = 1 << 29  # bytes of weights that kernels read; more than caches hold
PASSES = 3
CONTEXT, TOKENS = 200, 100  # of the embedded model's
SHORTEST = 1e-9  # seconds; what is less, a clock could not tell from nothing


def measure(folder: Path) -> Profile:
    """All rates of this machine (the memory's and the kernels' only where the CPU's own kernels run), the disk's for the one on
    which `folder` lies; the folder is made if need be.

    Raises CapacityError, before anything is measured, without room for the file in memory and on the disk; OSError for a
    folder that cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, free in (("on the disk", shutil.disk_usage(folder).free), ("in memory", available_memory())):
        if free is not None and free < 2 * SAMPLE:
            raise CapacityError(f"Measuring needs {in_bytes(2 * SAMPLE)} free {place}, but there are {in_bytes(free)}.",
                                f"Make room in {folder}." if place == "on the disk" else "Stop other programs.")
    sequential, at_random = disk_rates(folder)
    gpu, to_gpu, from_gpu, vram = gpu_rates()
    bare = Profile(None, sequential, at_random, to_gpu, from_gpu, gpu, str(folder.absolute()), date.today().isoformat(), vram)
    return bare if backends.cpu_trouble() is not None else with_kernels(bare)


def with_kernels(profile: Profile, formats: Sequence[str] = speeds.MEASURED, passes: int | None = None) -> Profile:
    """The profile with what the CPU's kernels do now: all of them for `formats`, the others' numbers are forgotten."""
    backends.use_threads(None)
    of_torch = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads spin for a while after each call, on the cores that ours compute on
    try:
        buffer = speeds.random_bytes(BUFFER)
        found = [_kernels_now(buffer, formats) for _ in range(passes or PASSES)]
    finally:
        torch.set_num_threads(of_torch)
    middle = {name: statistics.median(each[name] for each, _ in found) for name in found[0][0]}
    kernels = {name: {what: statistics.median(each[name][what] for _, each in found) for what in speeds.Speed._fields}
               for name in formats}
    return replace(profile, kernels=kernels, memory=middle["memory"], attention=middle["attention"], index=middle["index"],
                   layer_s=middle["layer_s"], token_s=middle["token_s"])


def _kernels_now(buffer: Tensor, formats: Sequence[str]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """One pass over everything, by field of the profile, and by format. Several passes are many seconds apart, so that a slow
    moment of the machine spoils one of them alone."""
    kernels = {name: speeds.speed_of(name, buffer)._asdict() for name in formats}
    layer_s, token_s = lost_seconds()
    return {"memory": backends.read_bandwidth(), "attention": speeds.attention_speed(), "index": speeds.index_speed(),
            "layer_s": layer_s, "token_s": token_s}, kernels


def lost_seconds() -> tuple[float, float]:
    """What a layer takes beside its products, and a token beside its layers: norms, mixing, routing, waiting for each other.

    Of the embedded model the whole and its first half are timed; their difference is two layers, one of each compressing kind.
    The products of so small a model are hardly more than their calls, and count as lost. Python's own share does not: it
    hides behind the kernels of a larger model, so here all kernels are queued before the first is computed.
    """
    source = open_source(catalog.resolve("tiny").located())
    whole = Model.bind(source, expand_limit=0)
    layers = source.config.num_hidden_layers
    config = replace(source.config, num_hidden_layers=layers // 2)
    half = Model(replace(whole.weights, layers=whole.weights.layers[:layers // 2]), config, whole.numerics)
    seconds = [_kernel_seconds(model) for model in (whole, half)]
    layer_s = max(seconds[0] - seconds[1], SHORTEST) / (layers - layers // 2)
    return layer_s, max(seconds[0] - layers * layer_s, SHORTEST)


def _kernel_seconds(model: Model) -> float:
    """Median of the kernels of single tokens behind a short context."""
    ids = torch.randint(0, model.config.vocab_size, (CONTEXT + TOKENS,), generator=torch.Generator().manual_seed(1))
    state, seconds = model.new_state(len(ids)), []
    model.forward(ids[:CONTEXT], state, logits="none")
    for token in ids[CONTEXT:].split(1):
        with backends.queued(lazily=True):
            model.forward(token, state)
            began = time.perf_counter()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def disk_rates(folder: Path) -> tuple[float | None, float | None]:
    """In order and at random; None where the system would answer from memory and cannot be told not to."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        if not uncached(file.fileno()):
            return None, None
        write_random(file.fileno(), SAMPLE)
        small = list(range(0, SAMPLE, TOUCHED))
        random.Random(1).shuffle(small)
        in_order = read_rate(file.fileno(), range(0, SAMPLE, PIECE), PIECE, readers=2)  # the next is asked for meanwhile
        return in_order, read_rate(file.fileno(), small, TOUCHED, readers=torch.get_num_threads())


def uncached(file: int) -> bool:
    """Makes reads and writes of an open file go to the disk itself; False where that is not possible."""
    if sys.platform == "win32":
        return False
    import fcntl  # Windows has none

    try:
        if sys.platform == "darwin":
            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        else:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def write_random(file: int, size: int) -> None:
    """Bytes that no disk can compress or store once; `size` is a multiple of PIECE. Raises OSError, of a full disk too."""
    with mmap.mmap(-1, PIECE) as buffer:  # anonymous maps begin with a page, as O_DIRECT demands
        for offset in range(0, size, PIECE):
            buffer[:] = os.urandom(PIECE)
            done = os.pwritev(file, [buffer], offset)
            if done != PIECE:
                raise OSError(f"Only {done} of {PIECE} bytes were written for the measurement of the disk")
    os.fsync(file)


def read_rate(file: int, offsets: Sequence[int], length: int, readers: int) -> float:
    """Bytes a second that `readers` threads get who read `length` bytes at each offset once, or for SECONDS."""
    waiting, began = iter(offsets), time.perf_counter()

    def read(_: int) -> int:
        done = 0
        with mmap.mmap(-1, length) as buffer:
            for offset in waiting:  # one iterator for all threads: each offset goes to one of them
                done += os.preadv(file, [buffer], offset)
                if time.perf_counter() - began > SECONDS:
                    break
        return done

    with ThreadPoolExecutor(readers) as pool:
        total = sum(pool.map(read, range(readers)))
    return total / (time.perf_counter() - began)


def gpu_rates() -> tuple[str | None, float | None, float | None, float | None]:
    """Name of the GPU that torch would take, the rates to it and back from pinned memory, and that of reading its own."""
    if not torch.cuda.is_available():
        return None, None, None, None
    here = torch.zeros(LINKED, dtype=torch.uint8).pin_memory()
    there = torch.zeros(LINKED, dtype=torch.uint8, device="cuda")
    another = torch.empty_like(there)
    vram = 2 * copy_rate(another, there)  # a copy reads as much as it writes
    return torch.cuda.get_device_name(), copy_rate(there, here), copy_rate(here, there), vram


def copy_rate(target: Tensor, source: Tensor) -> float:
    """Bytes a second of copying `source` to a `target` of its shape and type: the median of COPIES, after one unmeasured."""
    devices = [tensor.device for tensor in (target, source) if tensor.is_cuda]
    seconds = []
    for _ in range(COPIES + 1):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return source.nbytes / statistics.median(seconds[1:])
