"""A model from the hub into the models folder: what is needed, what is here, what it takes (`plan`), and the doing (`Pull`).

Files gather in models/incoming/NAME. When all are verified and their headers fit together, the manifest is written there
and the folder gets its place by one rename: a model is on this machine whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from dsv4_quant.files.headers import read_header
from dsv4cli import __version__, paths
from dsv4cli.console import in_bytes
from dsv4cli.errors import CapacityError, Dsv4Error, UsageError
from dsv4cli.registry import catalog, hub, store, usage
from dsv4cli.registry.catalog import Entry
from dsv4cli.registry.download import WORKERS, Download, State
from dsv4cli.registry.hub import HubError, Listing, RemoteFile
from dsv4cli.registry.incoming import JOURNAL, Incoming, free, writing

BESIDE = ("*.json", "LICENSE*", "README.md", "*.jinja")  # what is fetched beside the weights, from the repo's first level
WORTH_NOTING = 50_000_000  # bytes: the rate of less says little about the network
QUANT = re.compile(r"(?:^|[^a-z0-9])((?:iq|q|tq)\d\w*|mxfp4\w*|b?f16|f32)(?=[^a-z0-9]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What a pull will do.

    files     all that make the model; `weights` is the GGUF among them, or "" for a checkpoint folder
    present   bytes that are here already
    """

    entry: Entry
    listing: Listing
    files: tuple[RemoteFile, ...]
    weights: str
    incoming: Incoming
    target: Path

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def present(self) -> int:
        return sum(self.incoming.present(file) for file in self.files)

    @property
    def missing(self) -> int:
        return self.total - self.present

    @property
    def free(self) -> int:
        return free(self.target)

    def seconds(self) -> float | None:
        """How long it will take at the rate of the last download; None if there was none."""
        rate = usage.rate()
        return self.missing / rate if rate else None

    def as_pulled(self, folder: Path) -> Entry:
        """What the model is called, and where it comes from, once it is installed. `folder` has its config.json, if any."""
        config = folder / "config.json"
        twin = catalog.published(config) if config.exists() else None
        return replace(self.entry, repo=self.listing.repo, revision=self.listing.commit, release=(twin or self.entry).release,
                       license=self.entry.license or self.listing.license)

    def adopt(self, incoming: Incoming, files: Iterable[RemoteFile]) -> None:
        """Links files that are on this disk already: of the revision installed before, in the hub's cache, or on their
        way in. They are hashed like everything else."""
        blobs = paths.hub_cache() / f"models--{self.listing.repo.replace('/', '--')}" / "blobs"
        installed = {path: sha256 for path, _, sha256 in self.entry.files}
        for file in files:
            if file.path in installed and file.sha256 in (None, installed[file.path]):
                incoming.adopt(file, self.target / file.path)
            incoming.adopt(file, blobs / file.digest)
            if incoming is not self.incoming and self.incoming.has(file):
                incoming.adopt(file, self.incoming.final(file))

    def check_disk(self) -> None:
        """Raises CapacityError if what is missing does not fit."""
        if self.missing > self.free:
            raise CapacityError(
                f"{self.entry.name} needs {in_bytes(self.missing)} more, but the disk of {paths.models()} has "
                f"{in_bytes(self.free)} free.",
                "Make room, or set DSV4_MODELS to a folder on a larger disk.")


def plan(entry: Entry, include: Sequence[str] = (), newest: bool = False) -> Plan:
    """Asks the hub what `entry` is made of. `newest`: of its main branch, instead of the revision that is known or installed.

    Raises UsageError for a model that is not fetched (embedded, or a path), HubError, and UsageError for several GGUFs.
    """
    if entry.bundled:
        raise UsageError(f"{entry.name} is part of dsv4; there is nothing to fetch.", f"Use it: dsv4 chat {entry.name}")
    if entry.repo is None:
        raise UsageError(f"{entry.name} is a path, not a model of the hub.", "Give a name (see dsv4 list) or owner/repo.")
    listing = hub.listing(entry.repo, None if newest and not entry.asked else entry.revision)
    files, weights = chosen(listing, entry.pick, include)
    folder = store.folder_name(entry.name)
    incoming = Incoming(paths.models() / store.INCOMING / folder)
    return Plan(entry, listing, tuple(sorted(files, key=_small_first)), weights, incoming, paths.models() / folder)


def chosen(listing: Listing, pick: str, include: Sequence[str]) -> tuple[list[RemoteFile], str]:
    """(files that make the model, the GGUF's first file or ""). Raises HubError for a repo without a model."""
    by_path = {file.path: file for file in listing.files}
    beside = [path for path in by_path if "/" not in path and any(fnmatch(path, pattern) for pattern in BESIDE)]
    more = [path for path in by_path if any(fnmatch(path, pattern) for pattern in include)]
    shards = [path for path in by_path if "/" not in path and path.endswith(".safetensors")]
    if "config.json" in by_path and shards and pick and not store.ggufs(list(by_path)):
        raise HubError(f"{listing.repo} holds a checkpoint and no GGUF called {pick}.",
                       f"Make one while it arrives: dsv4 pull {listing.repo} --quant {pick}")
    if "config.json" in by_path and shards and not pick:
        wanted, weights = {*beside, *shards, *more}, ""
    else:
        names = ", ".join(f"{listing.repo}:{name}" for name in store.ggufs(list(by_path))[:4])
        first = store.one_gguf(listing.repo, list(by_path), pick, f"Name one: {names}.")
        if first is None:
            raise HubError(f"{listing.repo} holds neither a checkpoint (config.json and .safetensors) nor a .gguf file.",
                           "Give a repo with a DeepSeek-V4 model; dsv4 list shows the known ones.")
        notes = [path for path in beside if not path.endswith(".json")]
        wanted, weights = {*notes, *store.parts_of(first, list(by_path)), *more}, first
    return [by_path[path] for path in sorted(wanted)], weights


def newer(entry: Entry) -> Listing | None:
    """The main branch's listing if it has other files for an installed model than those that are here. Raises HubError."""
    if not entry.repo or entry.asked:
        return None
    now = hub.listing(entry.repo, tries=1)
    if now.commit == entry.revision:
        return None
    here = {path: (size, sha256) for path, size, sha256 in entry.files}
    files, _ = chosen(now, entry.pick, ())
    same = here and all(here.get(file.path, (0, ""))[0] == file.size and file.sha256 in (None, here[file.path][1])
                        for file in files)
    return None if same else now


class Pull:
    """Carries out a plan. `run` yields the download's state ten times a second; afterwards the model is installed."""

    def __init__(self, plan: Plan, workers: int = WORKERS, rate: float | None = None) -> None:
        self.plan, self._workers, self._rate = plan, workers, rate

    def run(self) -> Iterator[State]:
        """Raises HubError and CorruptFile (exit 4), CapacityError (3), Dsv4Error if another process is at it."""
        plan = self.plan
        with locked(plan.entry.name):
            if plan.incoming.folder.is_dir():
                with writing(plan.incoming.folder):
                    plan.incoming.clean(list(plan.files))
            plan.adopt(plan.incoming, plan.files)
            plan.check_disk()
            config = [file for file in plan.files if file.path == "config.json"]
            for _ in self._download(config).run():  # a model that dsv4 cannot read is refused before its weights
                pass
            download = self._download(plan.files)
            yield from download.run()
            if download.state.fetched > WORTH_NOTING:
                usage.note_rate(download.state.rate)
            self.install()

    def _download(self, files: Sequence[RemoteFile]) -> Download:
        listing = self.plan.listing
        return Download(listing.repo, listing.commit, files, self.plan.incoming, workers=self._workers, rate=self._rate)

    def install(self) -> None:
        """Checks the files together, writes the manifest, and gives the folder its place."""
        plan, folder = self.plan, self.plan.incoming.folder
        header = read_header(folder / plan.weights)
        quant = QUANT.search(plan.weights)
        files = [(file.path, file.size, plan.incoming.sha256(file)) for file in plan.files]
        write_manifest(folder, plan.as_pulled(folder), context=header.config.max_position_embeddings, file=plan.weights,
                       quant=(quant[1].lower() if quant else "gguf") if plan.weights else "official", files=files)
        place(folder, plan.target)
        usage.note(plan.target / plan.weights, "verified")


def write_manifest(folder: Path, entry: Entry, *, context: int, file: str, quant: str, files: Sequence[tuple[str, int, str]],
                   recipe: str = "") -> None:
    """Says in `folder` what model it is, in one step. `file`: the GGUF, or "" for a checkpoint; `files`: path, size, SHA-256."""
    listed = [{"path": path, "size": size, "sha256": sha256} for path, size, sha256 in files]
    manifest = {"name": entry.name, "repo": entry.repo, "revision": entry.revision, "release": entry.release,
                "license": entry.license, "quant": quant, "file": file, "context": context, "recipe": recipe,
                "pulled": datetime.now(timezone.utc).isoformat(timespec="seconds"), "dsv4": __version__, "files": listed}
    with writing(folder):
        draft = folder / f"{store.MANIFEST}.new"
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        with draft.open("rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(draft, folder / store.MANIFEST)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """No other process pulls, repairs or removes the model `name` meanwhile. Raises Dsv4Error if one does."""
    folder = paths.models() / store.INCOMING
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{store.folder_name(name)}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Dsv4Error(f"Another dsv4 is working on {name} right now.",
                            "Wait until it has ended; or end it: what it fetched is kept.") from None
    try:
        yield
    finally:
        lock.release()


def place(folder: Path, target: Path) -> None:
    """Renames `folder`, which has its manifest, to `target`. A model that is there makes room; a folder that is no model
    does not."""
    with writing(folder):
        _swap(folder, target)
        (target / JOURNAL).unlink(missing_ok=True)


def _swap(folder: Path, target: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        if not (target / store.MANIFEST).exists():
            raise Dsv4Error(f"{target} is in the way: it is not a model that dsv4 installed.", "Move it elsewhere, then run the "
                            "same command again; nothing is fetched twice.")
        os.replace(target, old)
    os.replace(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def _small_first(file: RemoteFile) -> tuple[bool, str]:
    return file.path.endswith((".safetensors", ".gguf")), file.path
