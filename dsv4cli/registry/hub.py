"""The Hugging Face hub: what a repo holds at a commit, and the bytes of its files from any offset.

huggingface_hub knows the routes, the token, the endpoint, offline mode and the proxies; everything here goes through its
session. What it raises becomes a HubError (final, exit code 4) or a Passing (worth another try), each a sentence and a hint.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from dsv4cli import __version__
from dsv4cli.errors import CorruptError

QUIET = 30.0  # seconds without a byte, after which a connection counts as broken
TRIES = 10  # without progress between them; with the pauses below four minutes, in which a router starts again
FIRST_TRIES = 3  # of the first question: whoever has just typed a command wants to know soon
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds after the first failure, doubled after each, and its bound
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait (Retry-After)
LONG = 1 << 18  # bytes of an answer that is worth a connection of its own
READ = 1 << 18  # bytes asked of a connection at once
PROXY = "Check HF_ENDPOINT and the proxy settings."
KEPT = "What was fetched is kept; run the same command to go on."

T = TypeVar("T")


class HubError(CorruptError):
    """The hub cannot be reached, refuses, or does not have what was asked for."""


class Passing(HubError):  # noqa: N818 - what it is, as below
    """A failure that may be gone in a moment. `wait`: the seconds that the server asked for."""

    wait: float | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo. `sha256` is known for large files (LFS, xet), `oid` (git's SHA-1 of a blob) for the others."""

    path: str
    size: int
    sha256: str | None = None
    oid: str | None = None

    @property
    def digest(self) -> str:
        return self.sha256 or self.oid or ""


@dataclass(frozen=True)
class Listing:
    """A repo at one commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    license: str = ""


@dataclass
class Body:
    """The answer to a request for bytes from `asked` on: they begin at `start`, and the file has `total` (None: unsaid)."""

    start: int
    total: int | None
    chunks: Iterator[bytes]


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def api() -> HfApi:
    return HfApi(endpoint=endpoint(), library_name="dsv4", library_version=__version__)


def listing(repo: str, revision: str | None = None, tries: int | None = None) -> Listing:
    """The files of owner/repo at a branch, tag or commit, with sizes and digests.

    Raises HubError: not there (with the nearest names), not allowed, not reachable, or a listing that makes no sense.
    """
    def ask() -> Any:
        with told(repo):
            return api().model_info(repo, revision=revision, files_metadata=True, timeout=QUIET)

    try:
        info = patiently(ask, tries or FIRST_TRIES)
        files = tuple(_remote_file(sibling, repo) for sibling in info.siblings or ())
        commit = re.fullmatch(r"[0-9a-f]{40}", info.sha)
        license = (info.card_data or {}).get("license") or ""
    except _Missing as error:
        raise _with_neighbours(error, repo, revision) from None
    except (KeyError, TypeError, AttributeError):
        commit = None
    if not commit:
        raise HubError(f"{endpoint()} does not answer as the hub does when asked for {repo}.", PROXY)
    return Listing(repo, commit[0], files, str(license).upper())


@contextmanager
def body(repo: str, commit: str, file: RemoteFile, start: int, end: int | None = None) -> Iterator[Body]:
    """The bytes of a file from `start` on, up to `end`; a server that ignores the range begins at 0, and says so in `Body.start`.

    Raises Passing for what may pass (reading the chunks too), HubError for the rest, RangeRefused for a 416.
    """
    headers = {**build_hf_headers(library_name="dsv4", library_version=__version__), "Accept-Encoding": "identity"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    url = hf_hub_url(repo, file.path, revision=commit, endpoint=endpoint())
    with told(repo, file.path), get_session().stream("GET", url, headers=headers, timeout=QUIET) as response:
        if response.status_code >= 400:
            raise refusal(response.status_code, response.headers, repo, file.path)
        begin, total = _extent(response)
        yield Body(begin, total, _chunks(response))


def _chunks(response: Any) -> Iterator[bytes]:
    """The bytes of an answer as they come. Of a long one, all behind the first are read from the connection itself, in larger
    pieces than the HTTP library's, which copies each several times: a download takes half the time where the network is no limit.
    """
    whole = response.headers.get("Content-Length", "")
    stream = response.extensions.get("network_stream")
    coded = "Transfer-Encoding" in response.headers or "Content-Encoding" in response.headers
    chunks = response.iter_raw()
    if stream is None or coded or response.http_version != "HTTP/1.1" or not whole.isdigit() or int(whole) < LONG:
        yield from chunks
        return
    first = next(chunks, b"")  # what came with the headers, or the next bytes; nothing is left in the library's buffer
    yield first
    left = int(whole) - len(first)
    core = sys.modules[type(stream).__module__.partition(".")[0]]
    while left:
        try:
            data = stream.read(min(left, READ), timeout=QUIET)
        except (core.NetworkError, core.TimeoutException) as error:
            raise _broken(error) from None
        if not data:
            return
        left -= len(data)
        yield data


def piece(repo: str, commit: str, file: RemoteFile, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on, which are there. Raises HubError."""

    def ask() -> bytes:
        found = bytearray()
        with body(repo, commit, file, start, start + length) as answer:
            wanted = start + length - answer.start
            for chunk in answer.chunks:
                found += chunk
                if len(found) >= wanted:
                    break
        if answer.start > start or len(found) < wanted:
            raise Passing(f"The hub ends {file.path} after {answer.start + len(found)} of {file.size} bytes.",
                          f"Try again later. {KEPT}")
        return bytes(found[start - answer.start : wanted])

    return patiently(ask, TRIES)


class RangeRefused(HubError):  # noqa: N818
    """416: the server has no bytes behind the offset."""


class _Missing(HubError):  # noqa: N818
    """404: the repo, the revision or the file."""


@contextmanager
def told(repo: str, path: str = "") -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP library raise into HubError and Passing."""
    library = _http_library()
    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing is fetched.", "Unset HF_HUB_OFFLINE to allow it.") from None
    except HFValidationError as error:
        raise HubError(f"{repo} cannot be a repo of the hub: {error}".split("\n")[0], "Repos are called owner/name.") from None
    except library.HTTPStatusError as error:
        raise refusal(error.response.status_code, error.response.headers, repo, path) from None
    except library.HTTPError as error:
        response = getattr(error, "response", None)  # huggingface_hub's own, made of a status
        if response is not None:
            raise refusal(response.status_code, response.headers, repo, path) from None
        raise _broken(error) from None
    except (library.InvalidURL, library.StreamError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a file of ours
        raise HubError(f"{endpoint()} does not answer as the hub does: {error or type(error).__name__}.",
                       PROXY) from None


def patiently(act: Callable[[], T], tries: int) -> T:
    """What `act` returns, tried again when it raises Passing."""
    for failures in range(1, tries):
        try:
            return act()
        except Passing as trouble:
            time.sleep(pause(failures, trouble.wait))
    return act()


def pause(failures: int, asked: float | None) -> float:
    """Seconds to wait after so many failures in a row, or as the server asked."""
    if asked is not None:
        return min(asked, LONGEST_ASKED)
    return min(PAUSE * 2 ** (failures - 1), LONGEST_PAUSE) if failures else 0.0


def refusal(status: int, headers: Any, repo: str, path: str = "") -> HubError:
    """The sentence for an HTTP status that is no success."""
    what = f"{path} of {repo}" if path else repo
    code = headers.get("X-Error-Code", "")
    if code == "RepoNotFound" or (status == 404 and not path):
        return _Missing(f"The hub has no {what}" + (", or not this revision of it." if code == "RevisionNotFound" else "."))
    if status == 404:
        return HubError(f"The hub no longer has {what} at this revision.", f"It changed meanwhile. {KEPT}")
    if status in (401, 403):
        return _forbidden(status, code, what, repo)
    if status == 416:
        return RangeRefused(f"The hub has no more bytes of {what}, but it promised more.", KEPT)
    if status == 429:
        trouble = Passing(f"The hub is asked too often (429) and does not give {what}.", f"Wait a while. {KEPT}")
        trouble.wait = _asked_to_wait(headers)
        return trouble
    if status >= 500 or status == 408:
        trouble = Passing(f"The hub fails ({status}) when asked for {what}.", f"Try again later. {KEPT}")
        trouble.wait = _asked_to_wait(headers)
        return trouble
    return HubError(f"The hub answers {status} when asked for {what}.", PROXY)


def _forbidden(status: int, code: str, what: str, repo: str) -> HubError:
    page = f"{endpoint()}/{repo}"
    if code == "GatedRepo":
        return HubError(f"The hub gives {what} only to those who accepted its terms ({status}).",
                        f"Accept them at {page}, then set HF_TOKEN to a token of that account (or run: hf auth login).")
    if status == 401 and get_token():
        return HubError(f"The hub does not accept the token that it got for {what} (401).",
                        f"Make a new one at {endpoint()}/settings/tokens and set HF_TOKEN to it (or run: hf auth login).")
    if status == 401:
        return HubError(f"The hub does not say whether {what} exists to somebody who is not logged in (401).",
                        f"Check the name. If it is private: set HF_TOKEN to a token from {endpoint()}/settings/tokens "
                        "(or run: hf auth login).")
    return HubError(f"The hub refuses {what} with this token (403).",
                    f"Ask for access at {page}, or set HF_TOKEN to a token that may read it (or run: hf auth login).")


def _broken(error: Exception) -> Passing:
    """The sentence for a connection that was not made or did not last."""
    host, reason = endpoint(), str(error) or type(error).__name__
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, socket.gaierror):
        return Passing(f"The name of {host} cannot be looked up: {cause.strerror}.",
                       f"Check the network connection, DNS and HF_ENDPOINT. {KEPT}")
    kind = type(error).__name__
    if kind in ("ConnectError", "ConnectTimeout", "ProxyError"):
        return Passing(f"{host} cannot be reached: {reason}.",
                       f"Check the network connection, HTTPS_PROXY and HF_ENDPOINT. {KEPT}")
    return Passing(f"The connection to {host} broke: {reason}.", f"Check the network connection. {KEPT}")


def _asked_to_wait(headers: Any) -> float | None:
    """Seconds of Retry-After, which is a number or a date; None without one."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _extent(response: Any) -> tuple[int, int | None]:
    """(offset of the first byte, length of the file or None) of an answer to a request with or without a range."""
    if response.status_code == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match:
            raise HubError(f"{endpoint()} answers a range without saying which.", PROXY)
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _remote_file(sibling: Any, repo: str) -> RemoteFile:
    """Raises HubError for a path that would leave its folder: names come from whoever made the repo."""
    path = sibling.rfilename
    parts = path.split("/")
    if "\\" in path or ":" in path or not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise HubError(f"{repo} holds a file with the impossible name {path!r}.", "Do not use this repo.")
    lfs = sibling.lfs
    if lfs is not None:
        return RemoteFile(path, int(lfs.size), str(lfs.sha256))
    return RemoteFile(path, int(sibling.size or 0), oid=sibling.blob_id)


def _with_neighbours(error: HubError, repo: str, revision: str | None) -> HubError:
    """The error with what there is instead: the repo's branches and tags, or the nearest repos of the same owner."""
    known: list[str] = []
    with suppress(HubError), told(repo):
        refs = api().list_repo_refs(repo) if revision else None
        known = [ref.name for ref in (*refs.branches, *refs.tags)] if refs else []
    if known:
        return HubError(f"The hub has no revision {revision} of {repo}.", f"It has {', '.join(known[:8])}.")
    with suppress(HubError), told(repo):
        known = [str(model.id) for model in api().list_models(author=repo.partition("/")[0], limit=200)]
    close = get_close_matches(repo, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else "Check the name; if the repo is private, set HF_TOKEN."
    return HubError(error.message, hint)


def _http_library() -> Any:
    """The HTTP library under huggingface_hub: httpx, or httpx2 since its version 2."""
    return sys.modules[type(get_session()).__module__.partition(".")[0]]
