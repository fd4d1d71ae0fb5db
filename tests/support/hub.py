"""A Hugging Face hub of our own on 127.0.0.1: the routes that huggingface_hub's client calls, and every fault at a switch.

    GET  /api/models/OWNER/NAME[/revision/REV]?blobs=True    the files of a commit, with sizes and digests
    GET  /api/models/OWNER/NAME/tree/REV                     the same, as huggingface_hub's own downloads ask since 2.0
    GET  /api/models/OWNER/NAME/refs, /api/models?author=    what else there is
    GET, HEAD /OWNER/NAME/resolve/REV/PATH                   small files; large ones (LFS) by redirect, as the real one does
    GET  /cdn/SHA256                                         the bytes of a large file

Requests with an absolute URL are answered too, so the hub can stand in for a proxy. `python -m tests.support.hub FOLDER`
serves a folder as test/model until its standard input ends, and prints its address first.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".gguf")  # what the hub keeps in LFS
PIECE = 16384


class Request(NamedTuple):
    """One line of the log. `path` is the file's, also where its bytes come from /cdn."""

    method: str
    path: str
    range: str
    token: str


class Stored(NamedTuple):
    """A file at a commit."""

    source: Path
    size: int
    sha256: str
    oid: str

    @property
    def large(self) -> bool:
        return self.source.name.endswith(LARGE)


@dataclass
class Fault:
    """What goes wrong with requests whose path matches `where`; `times` of them, or all.

    status, headers   the answer instead of a file or a listing
    cut               bytes of a body after which the connection is dropped
    short             the body is said to have that many bytes fewer, and has
    flip              an offset of the file at which one bit is wrong
    deaf              ranges are ignored
    slow              seconds between two pieces of 16 KB
    act               anything else: called before the answer
    """

    where: str
    times: int = 1 << 30
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int = 0
    flip: int | None = None
    deaf: bool = False
    slow: float = 0.0
    act: Callable[[], None] = lambda: None


class Hub:
    """`with Hub() as hub:` runs one. `address` is what HF_ENDPOINT wants; `log` has the requests so far."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, Stored]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.private: dict[str, tuple[int, str]] = {}  # repo -> status and X-Error-Code without a token
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repo: str, folder: Path, branch: str = "main") -> str:
        """The files of a folder become a commit of the repo, and the head of a branch; the commit."""
        files = {path.relative_to(folder).as_posix(): stored(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.branches[repo, branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [request.path for request in self.log if request.method == "GET" and not request.path.startswith("/api")]

    def fault(self, path: str) -> Fault:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, path):
                fault.times -= 1
                return fault
        return Fault("")


def stored(path: Path) -> Stored:
    data = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return Stored(path, len(data), hashlib.sha256(data).hexdigest(), oid)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the hub's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path.startswith("/api/models"):
                self._api(path, parse_qs(url.query))
            elif path.startswith("/cdn/"):
                found = [(name, file) for commits in self.hub.repos.values() for files in commits.values()
                         for name, file in files.items() if file.sha256 == path[5:]]
                self._file(*found[0])
            else:
                self._resolve(path)

    def _log(self, path: str) -> Fault:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.log.append(Request(self.command, path, self.headers.get("Range", ""), token))
        fault = self.hub.fault(path)
        fault.act()
        return fault

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        fault = self._log(path)
        if fault.status:
            return self._say(fault.status, {"error": "a fault"}, fault.headers)
        if path == "/api/models":
            owner = query.get("author", [""])[0]
            return self._say(200, [{"id": repo} for repo in self.hub.repos if repo.startswith(f"{owner}/")])
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(refs)|/revision/(.+)|/tree/(.+))?", path)
        if not match or match[1] not in self.hub.repos:
            return self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if match[2]:
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                        for (repo, name), commit in self.hub.branches.items() if repo == match[1]]
            return self._say(200, {"branches": branches, "tags": [], "converts": []})
        if refused := self._refused(match[1]):
            return self._say(refused[0], {"error": "no"}, {"X-Error-Code": refused[1]})
        commit = self._commit(match[1], match[3] or match[4] or "main")
        if commit is None:
            return self._say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if match[4]:
            return self._say(200, [_leaf(name, file) for name, file in self.hub.repos[match[1]][commit].items()])
        siblings = [_sibling(name, file) for name, file in self.hub.repos[match[1]][commit].items()]
        return self._say(200, {"id": match[1], "modelId": match[1], "sha": commit, "siblings": siblings, "tags": [],
                               "cardData": {"license": "mit"}, "private": False, "downloads": 0, "likes": 0})

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        commit = self._commit(match[1], match[2]) if match else None
        file = self.hub.repos[match[1]][commit].get(match[3]) if match and commit else None
        if not match or file is None:
            self._log(path)
            return self._say(404, {}, {"X-Error-Code": "EntryNotFound"})
        if refused := self._refused(match[1]):
            self._log(path)
            return self._say(refused[0], {}, {"X-Error-Code": refused[1]})
        if not file.large:
            return self._file(match[3], file, {"X-Repo-Commit": commit or "", "ETag": f'"{file.oid}"'})
        self.send_response(302)
        host = self.headers["Host"].replace("127.0.0.1", "localhost")  # another host, as that of the real bytes
        address = f"http://{host}/cdn/{file.sha256}"
        for name, value in {"Location": address, "X-Repo-Commit": commit or "", "X-Linked-Size": str(file.size),
                            "X-Linked-Etag": f'"{file.sha256}"', "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _file(self, name: str, file: Stored, headers: dict[str, str] | None = None) -> None:
        fault = self._log(name)
        if fault.status:
            return self._say(fault.status, {"error": "a fault"}, fault.headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match and not fault.deaf else 0
        end = min(int(match[2]) + 1, file.size) if match and match[2] and not fault.deaf else file.size
        if start and start >= file.size:
            return self._say(416, {}, {"Content-Range": f"bytes */{file.size}"})
        end -= fault.short
        self.send_response(206 if match and not fault.deaf else 200)
        if match and not fault.deaf:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{file.size - fault.short}")
        for header, value in {"Content-Length": str(end - start), "Accept-Ranges": "bytes", **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self._body(file, start, end, fault)

    def _body(self, file: Stored, start: int, end: int, fault: Fault) -> None:
        stop = end if fault.cut is None else min(end, start + fault.cut)
        self.wfile.flush()
        if fault.flip is None and not fault.slow:
            with file.source.open("rb") as source:
                self.connection.sendfile(source, start, stop - start)
        else:
            data = bytearray(file.source.read_bytes())
            if fault.flip is not None:
                data[fault.flip] ^= 1
            for at in range(start, stop, PIECE):
                self.wfile.write(data[at : min(at + PIECE, stop)])
                time.sleep(fault.slow)
        if stop < end:  # unlike after a whole answer, the other side must notice
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _refused(self, repo: str) -> tuple[int, str] | None:
        return None if self.headers.get("Authorization") else self.hub.private.get(repo)

    def _commit(self, repo: str, revision: str) -> str | None:
        commits = self.hub.repos.get(repo, {})
        return revision if revision in commits else self.hub.branches.get((repo, revision))

    def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _sibling(name: str, file: Stored) -> dict[str, Any]:
    about: dict[str, Any] = {"rfilename": name, "size": file.size, "blobId": file.oid}
    if file.large:
        about["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return about


def _leaf(name: str, file: Stored) -> dict[str, Any]:
    leaf: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
    if file.large:
        leaf["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return leaf


if __name__ == "__main__":
    with Hub() as served:
        served.publish("test/model", Path(sys.argv[1]))
        print(served.address, flush=True)
        sys.stdin.read()
