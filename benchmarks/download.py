"""What verifying costs: the time and the CPU time of a pull from this machine beside a plain copy of the same bytes.

A process of its own serves random shards on 127.0.0.1, another fetches them, in turns: `copy` writes what huggingface_hub's
session yields to files and does nothing else, `bare` does so with the larger pieces that dsv4 reads from the connection, `pull`
is dsv4's download (SHA-256, header, journal, fsync), `hub` is huggingface_hub's own download, which compares lengths only.
`hash` is hashlib's SHA-256 of the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from rows import append

ROOT = Path(__file__).resolve().parents[1]
REPO = "test/model"
WAYS = ("copy", "bare", "pull", "hub", "hash")
FIELDS = ("way", "mb", "shards", "workers", "seconds", "cpu_seconds", "cores", "python", "huggingface_hub", "cpu", "commit",
          "date")
MB = 1_000_000


def main() -> None:
    arguments = parser().parse_args()
    if arguments.child:
        print(json.dumps(measured(*arguments.child, arguments.workers)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch) / "published"
        make_shards(folder, arguments.shards, arguments.mb * MB)
        rows = rounds(folder, Path(scratch), arguments)
    table(rows, arguments)
    if arguments.out:
        append(arguments.out, FIELDS, named(rows, arguments))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=200, help="megabytes a shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--workers", type=int, default=4, help="files at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for the files (in memory, such as /dev/shm, the disk is left out)")
    parser.add_argument("--out", type=Path, help="append the rows to this CSV")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FROM", "TO"), help=argparse.SUPPRESS)
    return parser


def make_shards(folder: Path, count: int, nbytes: int) -> None:
    """Safetensors files of one tensor each."""
    folder.mkdir()
    for number in range(1, count + 1):
        header = json.dumps({f"t{number}": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
        with (folder / f"model-{number:05}-of-{count:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header + os.urandom(nbytes))


def rounds(folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every way in turns; seconds and CPU seconds of each run."""
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(scratch / "hf"),
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                    "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "quant", "kernels"))}
    server = subprocess.Popen([sys.executable, "-m", "tests.support.hub", str(folder)], env=surroundings, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout
    address = server.stdout.readline().strip()
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for turn in range(arguments.rounds):
            for way in WAYS:
                into = scratch / f"{way}-{turn}"
                into.mkdir()
                command = [sys.executable, __file__, "--workers", str(arguments.workers), "--child", way, str(folder), str(into)]
                done = subprocess.run(command, env={**surroundings, "HF_ENDPOINT": address}, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[way].append(json.loads(done.stdout))
                subprocess.run(["rm", "-r", str(into)], check=True)
    finally:
        server.communicate()
    return found


def measured(way: str, source: str, into: str, workers: int) -> dict[str, float]:
    """One run in this process, without its imports and its first request, which find out what there is."""
    from dsv4cli.registry import hub

    listing = hub.listing(REPO)
    act = {"copy": copy, "bare": bare, "pull": pull, "hub": by_hub, "hash": hash_alone}[way]
    began, spent = time.perf_counter(), cpu_seconds()
    act(listing, Path(into), Path(source), workers)
    return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - spent}


def copy(listing, into: Path, source: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session

    def one(file) -> None:  # type: ignore[no-untyped-def]
        url = hf_hub_url(REPO, file.path, revision=listing.commit, endpoint=os.environ["HF_ENDPOINT"])
        with get_session().stream("GET", url) as response, (into / file.path).open("wb", buffering=0) as out:
            for chunk in response.iter_raw():
                out.write(chunk)

    spread(one, listing.files, workers)


def bare(listing, into: Path, source: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    from dsv4cli.registry import hub

    def one(file) -> None:  # type: ignore[no-untyped-def]
        with hub.body(REPO, listing.commit, file, 0) as body, (into / file.path).open("wb", buffering=0) as out:
            for chunk in body.chunks:
                out.write(chunk)

    spread(one, listing.files, workers)


def pull(listing, into: Path, source: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    from dsv4cli.registry.download import Download
    from dsv4cli.registry.incoming import Incoming

    for _ in Download(REPO, listing.commit, listing.files, Incoming(into), workers=workers).run():
        pass


def by_hub(listing, into: Path, source: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    from huggingface_hub import snapshot_download

    snapshot_download(REPO, endpoint=os.environ["HF_ENDPOINT"], local_dir=into, max_workers=workers)


def hash_alone(listing, into: Path, source: Path, workers: int) -> None:  # type: ignore[no-untyped-def]
    def one(file) -> None:  # type: ignore[no-untyped-def]
        with (source / file.path).open("rb") as stream:
            hashlib.file_digest(stream, "sha256")

    spread(one, listing.files, workers)


def spread(act, files, workers: int) -> None:  # type: ignore[no-untyped-def]
    waiting = list(files)

    def work() -> None:
        while waiting:
            act(waiting.pop())

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def table(rows: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    total = arguments.mb * arguments.shards
    print(f"{total} MB in {arguments.shards} shards, {arguments.workers} at once, medians of {arguments.rounds}; "
          f"Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("| way | seconds | MB/s | of a copy | CPU seconds | of a copy |\n|---|---|---|---|---|---|")
    base = {key: statistics.median(run[key] for run in rows["copy"]) for key in ("seconds", "cpu")}
    for way in WAYS:
        seconds, cpu = (statistics.median(run[key] for run in rows[way]) for key in ("seconds", "cpu"))
        print(f"| {way} | {seconds:.2f} | {total / seconds:.0f} | {seconds / base['seconds']:.2f} | {cpu:.2f} | "
              f"{cpu / base['cpu']:.2f} |")


def named(rows: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row of FIELDS for each run."""
    from cpu import machine  # it imports torch, which the measured processes do without

    here = {key: value for key, value in machine().items() if key in FIELDS} | {
        "mb": arguments.mb, "shards": arguments.shards, "workers": arguments.workers, "cores": os.cpu_count(),
        "python": platform.python_version(), "huggingface_hub": version("huggingface_hub")}
    for way, runs in rows.items():
        for run in runs:
            yield {**here, "way": way, "seconds": f"{run['seconds']:.3f}", "cpu_seconds": f"{run['cpu']:.3f}"}


if __name__ == "__main__":
    main()
