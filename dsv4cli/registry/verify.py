"""Whether the files of a model still hold what was published, and fetching again the ones that do not."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_quant.files.headers import read_header
from dsv4cli import paths
from dsv4cli.errors import Dsv4Error
from dsv4cli.registry import hashing, hub, store, usage
from dsv4cli.registry.catalog import Entry, source_of
from dsv4cli.registry.download import FRAME, WORKERS, Download, State
from dsv4cli.registry.hub import RemoteFile
from dsv4cli.registry.incoming import Incoming, writing
from dsv4cli.registry.pull import locked

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
THREADS = 4  # a disk that is asked by more becomes no faster


@dataclass(frozen=True)
class Bad:
    """A file that is not what it should be, and why. `digest`: its SHA-256, or git's for a small one in the hub's cache."""

    path: str
    size: int
    digest: str
    reason: str


@dataclass
class Check:
    """What is known of a model's files. `run` fills `bad`; `files` is empty where nothing says what they should hold."""

    entry: Entry
    folder: Path
    files: tuple[tuple[str, int, str], ...]
    state: State
    bad: list[Bad] = field(default_factory=list)

    def run(self) -> Iterator[State]:
        """Hashes the files, yielding the state ten times a second; then parses the headers, which belong together.

        Raises CorruptFile for headers that contradict each other although every digest is right, or none is known.
        """
        stop, lock = threading.Event(), threading.Lock()
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = [pool.submit(self._one, path, size, digest, stop, lock) for path, size, digest in self.files]
            try:
                while wait(tasks, FRAME).not_done:
                    yield self.state
            finally:
                stop.set()
        for task in tasks:
            task.result()
        yield self.state
        self.bad.sort(key=lambda bad: bad.path)
        if not self.bad:
            read_header(self.entry.located())
            if self.files:
                usage.note(self.entry.located(), "verified")

    def _one(self, path: str, size: int, digest: str, stop: threading.Event, lock: threading.Lock) -> None:
        def hashed(nbytes: int) -> None:
            if stop.is_set():
                raise InterruptedError
            with lock:
                self.state.settled += nbytes
                self.state.fetched += nbytes

        file = self.folder / path
        try:
            there = file.stat().st_size
            found = hashing.of_file(file, hashed) if there == size else ()
            reason = f"has {there} bytes instead of {size}" if there != size else "has other content than was published"
        except InterruptedError:
            return
        except OSError as error:
            found, reason = (), "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        if digest not in found:
            self.bad.append(Bad(path, size, digest, reason))


def check(entry: Entry) -> Check:
    """A check of an installed model: by its manifest, or in the hub's cache by the names of the blobs."""
    path = entry.located()
    folder = _root(entry) if entry.files else path if path.is_dir() else path.parent
    files = entry.files or tuple(_of_hub_cache(folder))
    return Check(entry, folder, files, State(sum(size for _, size, _ in files)))


def repair(entry: Entry, bad: Sequence[Bad], workers: int = WORKERS, rate: float | None = None) -> Iterator[State]:
    """Fetches the bad files alone and puts each in its place; yields the download's state. Raises as `Pull.run`.

    Raises Dsv4Error for a model that was made here, or of which nothing says where it comes from.
    """
    path = entry.located()
    if entry.recipe:
        raise Dsv4Error(f"{entry.name} was made here, so the hub has no copy of it.",
                        f"Make it again: dsv4 rm {entry.name}, then dsv4 pull {source_of(entry).name} --quant {entry.recipe}")
    cached = paths.hub_cache() in path.parents
    if not (entry.repo and entry.revision and (entry.files or cached)):
        raise Dsv4Error(f"{entry.name} was not fetched by dsv4 pull, so nothing says where its files come from.",
                        f"Fetch it with: dsv4 pull {entry.repo or entry.name}" if entry.repo else "Get the files again by hand.")
    with locked(entry.name):
        if cached:
            folder, files = path if path.is_dir() else path.parent, _published(entry.repo, entry.revision, bad)
            incoming = Incoming(folder.parents[1] / "dsv4-repair")  # on the cache's own disk
        else:
            folder, files = _root(entry), [RemoteFile(one.path, one.size, one.digest) for one in bad]
            incoming = Incoming(paths.models() / store.INCOMING / f"{store.folder_name(entry.name)}.repair")
        yield from Download(entry.repo, entry.revision, files, incoming, workers=workers, rate=rate).run()
        with writing(folder):
            for file in files:
                place = (folder / file.path).resolve()  # in the cache a blob, to which the name is a link
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(incoming.final(file), place)
            incoming.remove()


def _root(entry: Entry) -> Path:
    """The folder of an installed model."""
    return next(manifest.root for manifest in store.manifests() if manifest.path == entry.path)


def _published(repo: str, commit: str, bad: Sequence[Bad]) -> list[RemoteFile]:
    """The bad files as the hub has them: the cache does not know how long they should be."""
    wanted = {one.path for one in bad}
    return [file for file in hub.listing(repo, commit).files if file.path in wanted]


def _of_hub_cache(snapshot: Path) -> Iterator[tuple[str, int, str]]:
    """The files of a snapshot: links to blobs, which are called by their SHA-256, or by git's digest."""
    for link in sorted(snapshot.glob("*")):
        if link.is_symlink() and BLOB.fullmatch(link.resolve().name):
            yield link.name, link.stat().st_size if link.exists() else 0, link.resolve().name
