"""A pull whose shards become one file as they arrive, and do not stay: `dsv4 pull NAME --quant RECIPE`.

    models/incoming/NAME+RECIPE/source/   what the hub has: small files, and at most two shards
                                heads/    the shards' headers, fetched before any shard
                                ...       the file that is made, and whatever its maker needs beside it

Who makes the file is not this module's business, which knows neither formats nor torch: a Maker. When the file is done, the
manifest is written, everything else removed, and the folder gets its place by a rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from dsv4_quant.files.headers import Head, read_head
from dsv4cli import paths
from dsv4cli.console import in_bytes
from dsv4cli.errors import CapacityError, UsageError
from dsv4cli.registry import hashing, hub, store, usage
from dsv4cli.registry.catalog import Entry
from dsv4cli.registry.download import FRAME, WORKERS, Download, State
from dsv4cli.registry.hub import RemoteFile
from dsv4cli.registry.incoming import Incoming, writing
from dsv4cli.registry.pull import WORTH_NOTING, Plan, Pull, locked, place, write_manifest

AT_ONCE = 2  # shards on the disk: while one is made use of, the next arrives
WORTH_MEASURING = 5_000_000  # bytes: the tokenizer and the index, where no larger download has told the network's rate
ALONG = ("LICENSE*", "README.md")  # what the model keeps of the checkpoint beside its weights


class Maker(Protocol):
    """Makes a file of shards, in any order; threads may call it at the same time."""

    def needs(self, shard: str) -> bool:
        """Whether the shard is needed still."""
        ...

    def admits(self, shard: str) -> bool:
        """Whether the shard may begin to arrive now."""
        ...

    def take(self, shard: str) -> None:
        """Uses a shard that is in the source's folder, and deletes it unless it is to stay."""
        ...


@dataclass
class Streamed:
    """`plan` is the checkpoint's, `entry` the model to be made of it. With `keep` the checkpoint is installed too."""

    plan: Plan
    entry: Entry
    keep: bool = False
    source: Incoming = field(init=False)
    _rate: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.plan.weights:
            raise UsageError(f"{self.plan.entry.name} is a GGUF; requantising while it streams starts from a checkpoint.",
                             "Pull it as it is, then give it to dsv4 quantize.")
        self.source = self.plan.incoming if self.keep else Incoming(self.folder / "source")

    @property
    def folder(self) -> Path:
        return paths.models() / store.INCOMING / store.folder_name(self.entry.name)

    @property
    def target(self) -> Path:
        return paths.models() / store.folder_name(self.entry.name)

    @property
    def shards(self) -> list[RemoteFile]:
        return [file for file in self.plan.files if file.path.endswith(".safetensors")]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process works on either model meanwhile. Raises Dsv4Error if one does."""
        with ExitStack() as stack:
            stack.enter_context(locked(self.entry.name))
            if self.keep:
                stack.enter_context(locked(self.plan.entry.name))
            yield

    def origin(self) -> Entry:
        """The checkpoint as it would be known if it were pulled."""
        return self.plan.as_pulled(self.source.folder)

    def look(self, rate: float | None = None) -> dict[str, Head]:
        """Fetches what planning needs: the small files, and the header of each shard by ranged requests; the headers.

        Raises HubError, CorruptFile (exit 4) and CapacityError (3).
        """
        small = [file for file in self.plan.files if not file.path.endswith(".safetensors")]
        if self.source.folder.is_dir():
            with writing(self.source.folder):
                self.source.clean(list(self.plan.files))
        self.plan.adopt(self.source, small)
        *_, state = self._download(small, rate=rate).run()
        self._rate = state.rate if state.fetched > WORTH_MEASURING else None
        with writing(self.folder):
            (self.folder / "heads").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            return dict(zip((file.path for file in self.shards), pool.map(self._head, self.shards), strict=True))

    def check_disk(self, peak: int) -> None:
        """Raises CapacityError unless the disk can take `peak` bytes, of which some may be here already."""
        missing = peak - self._here()
        if missing > self.plan.free:
            raise CapacityError(
                f"{self.entry.name} needs {in_bytes(missing)} more while it is made, but the disk of {paths.models()} has "
                f"{in_bytes(self.plan.free)} free.",
                "Make room, set DSV4_MODELS to a folder on a larger disk, or choose a smaller recipe.")

    def needed(self, maker: Maker) -> list[RemoteFile]:
        """The shards that are to be fetched, or handed over from where they lie."""
        return [file for file in self.shards if self.keep or maker.needs(file.path)]

    def run(self, maker: Maker, rate: float | None = None) -> Iterator[State]:
        """Hands every shard that is needed to the maker, yielding the state ten times a second. Raises as Download.run, and
        what the maker raises."""
        needed = self.needed(maker)
        self.plan.adopt(self.source, needed)
        yield from self._download(needed, maker, rate).run()

    def describe(self, made: Path, context: int) -> Iterator[State]:
        """Hashes the made file and writes the manifest, yielding the state. From here on only `finish` is left to do."""
        along = [file for file in self.plan.files if any(fnmatch(file.path, pattern) for pattern in ALONG)]
        for file in along:
            with writing(self.folder):
                shutil.copyfile(self.source.final(file), self.folder / file.path)
        state = State(made.stat().st_size)

        def hashed(nbytes: int) -> None:
            state.settled += nbytes
            state.fetched += nbytes

        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(hashing.of_file, made, hashed)
            while wait([task], FRAME).not_done:
                yield state
        files = [(made.name, state.total, task.result()[0]),
                 *((file.path, file.size, self.source.sha256(file)) for file in along)]
        if self.keep:
            Pull(self.plan).install()
        entry = replace(self.plan.as_pulled(self.plan.target if self.keep else self.source.folder), name=self.entry.name)
        write_manifest(self.folder, entry, context=context, file=made.name, quant=self.entry.recipe, files=files,
                       recipe=self.entry.recipe)
        yield state

    def described(self) -> bool:
        """Whether an earlier run came as far as `describe`."""
        manifest = self._manifest()
        return manifest is not None and manifest.revision == self.plan.listing.commit

    def finish(self) -> Path:
        """Removes all but the model, and gives it its place; the model's file."""
        manifest = self._manifest()
        assert manifest is not None
        wanted = {store.MANIFEST, *(path for path, _, _ in manifest.files)}
        with writing(self.folder):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in wanted:
                    path.unlink()
        place(self.folder, self.target)
        model = self.target / manifest.path.name
        usage.note(model, "verified")
        return model

    def seconds(self, missing: int) -> float | None:
        """How long so many bytes take: as the last time with this recipe, else as the last download; None if there was none."""
        rate = usage.rate(self._kind) or usage.rate() or self._rate
        return missing / rate if rate else None

    def note_rate(self, state: State) -> None:
        """Remembers how fast it went, which may be the network's doing or the processor's."""
        if state.fetched > WORTH_NOTING:
            usage.note_rate(state.rate, self._kind)

    @property
    def _kind(self) -> str:
        return f"rate with {self.entry.recipe}"

    def _manifest(self) -> store.Manifest | None:
        return next((one for one in store.manifests(self.folder.parent) if one.path.parent == self.folder), None)

    def _download(self, files: Sequence[RemoteFile], maker: Maker | None = None, rate: float | None = None) -> Download:
        listing = self.plan.listing
        if maker is None:
            return Download(listing.repo, listing.commit, files, self.source, rate=rate)
        return Download(listing.repo, listing.commit, files, self.source, workers=AT_ONCE, rate=rate,
                        arrived=lambda file, path: maker.take(file.path), admitted=lambda file: maker.admits(file.path))

    def _head(self, file: RemoteFile) -> Head:
        """The header of a shard, which is asked for once."""
        path = self.folder / "heads" / f"{file.path}.{file.digest[:16]}"
        if not path.exists():
            listing = self.plan.listing
            data = read_head(lambda start, length: hub.piece(listing.repo, listing.commit, file, start, length), file.size,
                             file.path)
            with writing(self.folder):
                draft = path.with_name(f"{path.name}.new")
                draft.write_bytes(data)
                os.replace(draft, path)
        return Head(path.read_bytes(), file.size, file.digest)

    def _here(self) -> int:
        """Bytes that the work so far takes on the disk; what is only reserved in a file takes none."""
        files = [path for folder in {self.folder, self.source.folder} for path in folder.rglob("*") if path.is_file()]
        return sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in files)
