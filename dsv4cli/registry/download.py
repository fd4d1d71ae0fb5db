"""Files of a repo into a folder: several at once, each resumed, hashed while it is written, and its header parsed.

`Download.run` yields now and then so that its caller can draw; `Download.state` is what to draw. A file counts (gets its
name) when its digest is the hub's and its header makes sense. Whoever wants the files one by one gives `arrived`: it is
called in the file's own thread, for files that are here already too, and may consume and delete the file; with two workers no
more than two are on the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from dsv4_quant.errors import QuantError
from dsv4_quant.files.headers import check_file
from dsv4cli.registry import hub
from dsv4cli.registry.hub import HubError, Passing, RemoteFile
from dsv4cli.registry.incoming import Incoming, Part

WORKERS = 4
FRAME = 0.1  # seconds between two looks at the state
LEFT_BEHIND = 2.0  # seconds, of all threads together
AGAIN = "Run the same command again; files that did not change are kept."


@dataclass
class State:
    """What a download has done so far; written by its threads, read by whoever draws it.

    total     bytes of all files
    settled   bytes of the files that are verified
    current   path -> (bytes here, size) of the files under way
    fetched   bytes that came over the network in this run
    waiting   path -> why it waits, while a file waits for another try
    beside    what else there is to tell, for whoever draws it
    """

    total: int
    settled: int = 0
    current: dict[str, tuple[int, int]] = field(default_factory=dict)
    fetched: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    beside: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.settled + sum(here for here, _ in list(self.current.values()))

    @property
    def rate(self) -> float:
        """Bytes a second over the network, since the beginning."""
        return self.fetched / max(time.monotonic() - self.began, 1e-6)

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.fetched else None


class Throttle:
    """Lets `rate` bytes a second pass, all threads together."""

    def __init__(self, rate: float | None) -> None:
        self._rate, self._lock, self._free_at = rate, threading.Lock(), 0.0

    def passed(self, nbytes: int) -> float:
        """Seconds to wait after `nbytes` so that the rate is kept."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + nbytes / self._rate
            return self._free_at - now


class Stopped(Exception):  # noqa: N818 - not an error: another thread failed, or the user left
    """Ends a thread whose result is not wanted any more."""


class Download:
    """`files` of `repo` at `commit` into `incoming`; those that are there and verified are not touched.

    A file is begun when `admitted` says so; until then it is asked again and again.
    """

    def __init__(self, repo: str, commit: str, files: Sequence[RemoteFile], incoming: Incoming, *, workers: int = WORKERS,
                 rate: float | None = None, arrived: Callable[[RemoteFile, Path], None] | None = None,
                 admitted: Callable[[RemoteFile], bool] = lambda file: True) -> None:
        self.repo, self.commit, self.incoming = repo, commit, incoming
        self._arrived, self._admitted = arrived, admitted
        todo = [file for file in files if arrived or not incoming.has(file)]
        self.state = State(sum(file.size for file in files))
        self.state.settled = self.state.total - sum(file.size for file in todo)
        self._queue: SimpleQueue[RemoteFile] = SimpleQueue()
        for file in todo:
            self._queue.put(file)
        self._workers = max(1, min(workers, len(todo)))
        self._throttle = Throttle(rate)
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> Iterator[State]:
        """Works until all is there, yielding its state ten times a second. Raises HubError, CapacityError, QuantError."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive() and not self._error:
                    thread.join(FRAME)
                    yield self.state
        finally:
            self._stop.set()
            until = time.monotonic() + LEFT_BEHIND
            for thread in threads:  # each writes what it has when its next bytes come; one that gets none is left behind
                thread.join(max(0.0, until - time.monotonic()))
        if self._error:
            raise self._error
        yield self.state

    def _work(self) -> None:
        with suppress(Stopped, Empty):
            try:
                while not self._stop.is_set():
                    file = self._queue.get_nowait()
                    while not self._admitted(file):
                        self._rest(FRAME)
                    self._one(file)
            except (Stopped, Empty):
                raise
            except BaseException as error:  # the first one is raised by `run`; the others are its echo
                self._error = self._error or error
                self._stop.set()

    def _one(self, file: RemoteFile) -> None:
        """Fetches, verifies and hands over one file."""
        path = self.incoming.final(file) if self.incoming.has(file) else self._verified(file)
        self.state.current[file.path] = (file.size, file.size)
        if self._arrived:
            self._arrived(file, path)
        self.state.current.pop(file.path)
        self.state.settled += file.size

    def _verified(self, file: RemoteFile) -> Path:
        """Fetches a file; its final path. What has the wrong content is fetched once more from its beginning."""
        for last in (False, True):
            part = self.incoming.prepare(file)
            sha256, git = self._fetched(file, part)
            if file.digest in (sha256, git) or not file.digest:
                break
            part.unlink()
            if last:
                raise self._wrong(file, sha256 if file.sha256 else git)
        try:
            check_file(part, file.path)
        except QuantError as error:
            raise type(error)(f"{self.repo}: {error.message}", "The file is as published; use another revision.") from None
        return self.incoming.verified(file, sha256)

    def _fetched(self, file: RemoteFile, path: Path) -> tuple[str, str]:
        """Completes the part; its digests."""
        while True:
            with Part(path, file.size, alone=self._workers == 1) as part:
                self.state.current[file.path] = (part.here, file.size)
                if part.here <= file.size and self._complete(file, part):
                    return part.finish()
            path.unlink()  # it cannot be the beginning of this file

    def _complete(self, file: RemoteFile, part: Part) -> bool:
        """Appends what is missing, trying again as long as it helps. False: the server knows nothing behind this part."""
        failures = 0
        while part.here < file.size:
            before = part.here
            try:
                self._append(file, part)
            except hub.RangeRefused:
                if not before:
                    raise
                return False
            except Passing as trouble:
                failures = 0 if part.here > before else failures + 1
                if failures >= hub.TRIES:
                    raise
                self._wait(file, trouble, hub.pause(failures, trouble.wait))
        return True

    def _append(self, file: RemoteFile, part: Part) -> None:
        """One request's bytes. Raises Passing if they end early, HubError if the file has another length than promised."""
        with hub.body(self.repo, self.commit, file, part.here) as body:
            if body.start not in (0, part.here):
                raise HubError(f"The hub sends {file.path} from byte {body.start}; asked for {part.here}.", hub.PROXY)
            if body.total is not None and body.total != file.size:
                self._check_length(file, body.total)
            known = part.here - body.start  # a server that ignores the range sends the old bytes once more
            for chunk in body.chunks:
                if self._stop.is_set():
                    raise Stopped
                if len(chunk) > known + file.size - part.here:
                    raise HubError(f"The hub sends more than the {file.size} bytes of {file.path}.", hub.PROXY)
                part.append(chunk[known:] if known else chunk)
                known = max(0, known - len(chunk))
                self.state.current[file.path] = (part.here, file.size)
                self.state.fetched += len(chunk)
                self._rest(self._throttle.passed(len(chunk)))
        if part.here < file.size:
            raise Passing(f"The hub ends {file.path} after {part.here} of {file.size} bytes.", f"Try again later. {hub.KEPT}")

    def _check_length(self, file: RemoteFile, total: int) -> None:
        """A length other than the listing's: another file by now, or a body that was cut (then what is there is taken)."""
        if total > file.size or self._changed(file):
            raise HubError(f"{file.path} of {self.repo} changed on the hub during the download: {total} bytes instead of "
                           f"{file.size}.", AGAIN)

    def _wrong(self, file: RemoteFile, found: str) -> HubError:
        if self._changed(file):
            return HubError(f"{file.path} of {self.repo} changed on the hub during the download.", AGAIN)
        return HubError(f"{file.path} arrives with the wrong content, twice: its digest is {found}, the hub promises "
                        f"{file.digest}.", "Something between the hub and here alters it; check the proxy, or try again later. "
                        "The other files are kept.")

    def _changed(self, file: RemoteFile) -> bool:
        """Whether the hub lists another file under this name and commit than before."""
        try:
            now = {other.path: other for other in hub.listing(self.repo, self.commit, tries=1).files}
        except Passing:
            return False
        except HubError:  # the commit itself is gone
            return True
        return now.get(file.path) != file

    def _wait(self, file: RemoteFile, trouble: Passing, seconds: float) -> None:
        if seconds:
            self.state.waiting[file.path] = f"{trouble.message} Trying again in {seconds:.0f} s."
            self._rest(seconds)
            self.state.waiting.pop(file.path, None)

    def _rest(self, seconds: float) -> None:
        if seconds > 0 and self._stop.wait(seconds):
            raise Stopped
