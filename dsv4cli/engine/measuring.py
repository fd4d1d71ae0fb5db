"""Measures a machine's bandwidths: memory, a disk in order and at random, and the link to a GPU. Takes some seconds.

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
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4cli.console import in_bytes
from dsv4cli.engine.machine import Profile
from dsv4cli.engine.memory import available_memory
from dsv4cli.errors import CapacityError

SAMPLE = 1 << 30  # bytes of the file
PIECE = 8 << 20  # of a read in order
TOUCHED = 128 << 10  # of a read at random: what Linux, unless told otherwise, reads around a mapped page that it lacks
SECONDS = 3.0  # after which a slow disk has been read enough
LINKED = 256 << 20  # bytes of a copy to or from a GPU
COPIES = 5


def measure(folder: Path) -> Profile:
    """All rates of this machine, the disk's for the one on which `folder` lies; the folder is made if need be.

    Raises CapacityError, before anything is measured, without room for the file in memory and on the disk; OSError for a
    folder that cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place, free in (("on the disk", shutil.disk_usage(folder).free), ("in memory", available_memory())):
        if free is not None and free < 2 * SAMPLE:
            raise CapacityError(f"Measuring needs {in_bytes(2 * SAMPLE)} free {place}, but there are {in_bytes(free)}.",
                                f"Make room in {folder}." if place == "on the disk" else "Stop other programs.")
    memory = backends.read_bandwidth() if backends.cpu_trouble() is None else None
    sequential, at_random = disk_rates(folder)
    gpu, to_gpu, from_gpu = link_rates()
    return Profile(memory, sequential, at_random, to_gpu, from_gpu, gpu, str(folder.absolute()), date.today().isoformat())


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


def link_rates() -> tuple[str | None, float | None, float | None]:
    """Name of the GPU that torch would take, and the rates to it and back from pinned memory."""
    if not torch.cuda.is_available():
        return None, None, None
    here = torch.zeros(LINKED, dtype=torch.uint8).pin_memory()
    there = torch.zeros(LINKED, dtype=torch.uint8, device="cuda")
    return torch.cuda.get_device_name(), copy_rate(there, here), copy_rate(here, there)


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
