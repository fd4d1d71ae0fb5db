"""From what the user calls a model to where it lies: `resolve`.

MODEL may be a name from catalog.toml, a checkpoint folder, a .gguf file, or owner/repo[@revision][:file-or-quant] on the
Hugging Face hub. A name
of the catalog wins over a folder of the same name in the current directory (write ./tiny for the folder). Nothing is
downloaded: an entry whose `path` is None is known but not on this machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from dsv4cli import paths
from dsv4cli.errors import Dsv4Error, UsageError
from dsv4cli.registry import store

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RELEASE = "april"  # nothing inside a checkpoint marks its release; this is the first one
OWNER_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<pick>[\w./-]+))?")


@dataclass(frozen=True)
class Entry:
    """A model, on this machine or not.

    name      as listed: the alias, the folder's or file's name, or owner/repo
    path      checkpoint folder or .gguf file; None when it is not here
    release   whose chat format it speaks: "april" or "0731"
    nbytes    tensor bytes of the published model; 0 where unknown. `shards` and `tensors` likewise
    pick      of a repo with several GGUF files, the one that is meant: a file or a quantisation
    asked     whether the user named the revision, so that no other will do
    context   in tokens, where a manifest says it; `files` likewise: path, size and SHA-256
    recipe    of a model that dsv4 pull makes of a checkpoint with dsv4 quantize's recipe; "" for one that is published so
    """

    name: str
    path: Path | None = None
    repo: str | None = None
    revision: str | None = None
    release: str = DEFAULT_RELEASE
    quant: str = "official"
    license: str = "MIT"
    note: str = ""
    bundled: bool = False
    shards: int = 0
    tensors: int = 0
    nbytes: int = 0
    config_sha256: str | None = None
    pick: str = ""
    asked: bool = False
    context: int = 0
    files: tuple[tuple[str, int, str], ...] = ()
    recipe: str = ""

    def located(self) -> Path:
        """The path. Raises Dsv4Error if the model is not on this machine, saying where it was looked for."""
        if self.path:
            return self.path
        if self.bundled:
            folder = paths.bundled(self.name)
            raise Dsv4Error(f"The embedded model {self.name} is missing: there is no {folder}.", "Install dsv4 again.")
        what = f"{self.name} ({self.repo})" if self.repo != self.name else self.name
        size = f" (its {self.shards} shards hold {self.nbytes / 1e9:.0f} GB)" if self.nbytes else ""
        raise Dsv4Error(f"{what} is not on this machine; looked in {paths.models()} and {paths.hub_cache()}.",
                        f"Fetch it with: dsv4 pull {self.name}{size}. Or give the path of its folder or .gguf file as MODEL.")


def resolve(name: str) -> Entry:
    """The model that `name` means. Raises UsageError for a name that means nothing, with the nearest names."""
    known = catalog()
    alias = name.lower()
    if alias in known:
        return _found(known[alias])
    base, _, recipe = alias.rpartition(":")
    if base in known and not known[base].bundled:
        return made(known[base], recipe)
    here = Path(name).expanduser()
    if _exists(here):
        return _at(here)
    spec = OWNER_REPO.fullmatch(name)
    if _looks_like_path(name) and not (spec and spec["pick"]):
        raise UsageError(f"There is no folder or file {name}.", "Give a checkpoint folder or a .gguf file.")
    if spec:
        named = Entry(name, repo=spec["repo"], revision=spec["revision"], asked=bool(spec["revision"]), pick=spec["pick"] or "",
                      quant="gguf" if spec["pick"] else "official", license="")
        return _found(next((entry for entry in known.values() if entry.repo == name), named))
    raise UsageError(f"There is no model called {name}.", nearest(name, list(known)))


def made(entry: Entry, recipe: str) -> Entry:
    """The model that a recipe makes of a checkpoint. Raises WrongUse for a name that is no recipe."""
    from dsv4_quant.recipe import named

    name = named(recipe).name
    return _found(replace(entry, name=f"{entry.name}:{name}", recipe=name, quant=name, path=None, pick="", note="", files=(),
                          shards=0, tensors=0, nbytes=0))


def source_of(entry: Entry) -> Entry:
    """The checkpoint that a model is made of; a model that is published so is its own."""
    return resolve(entry.name.removesuffix(f":{entry.recipe}")) if entry.recipe else entry


def names_model(word: str) -> bool:
    """Whether `word` surely means a model: a known name, a checkpoint or .gguf on the disk, a repo in the cache."""
    here = Path(word).expanduser()
    try:
        on_disk = (here / "config.json").exists() or (here.suffix == ".gguf" and here.exists())
        return on_disk or word.lower() in catalog() or _here_by_repo(word)
    except (OSError, ValueError):  # a long prompt is no file name
        return False


def _here_by_repo(word: str) -> bool:
    spec = OWNER_REPO.fullmatch(word)
    if not spec:
        return False
    installed_so = any(manifest.name == word for manifest in store.manifests())
    return installed_so or store.hub_snapshot(spec["repo"], spec["revision"], spec["pick"] or "") is not None


def nearest(name: str, known: list[str]) -> str:
    """A hint: the names most like `name`, or all of them."""
    close = get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known models: {', '.join(known)}. Or give the path of a checkpoint folder or a .gguf file, or owner/repo."


@cache
def catalog() -> dict[str, Entry]:
    """The known models by name, in the order of catalog.toml, without looking at the disk."""
    data = tomllib.loads((Path(__file__).parent / "catalog.toml").read_text(encoding="utf-8"))
    return {name: _entry(name, fields) for name, fields in data.items()}


def installed() -> Iterator[Entry]:
    """The models on this machine that have a name: embedded, in the models folder, or known and in the hub's cache."""
    listed = set()
    for entry in map(_found, catalog().values()):
        if entry.path:
            listed.add(entry.path)
            yield entry
    for manifest in store.manifests():
        if manifest.path not in listed:
            yield _of_manifest(manifest)


def _entry(name: str, fields: dict[str, Any]) -> Entry:
    fields = dict(fields)
    return Entry(name, nbytes=fields.pop("bytes", 0), **fields)


def _of_manifest(manifest: store.Manifest, known: Entry | None = None) -> Entry:
    """The entry of an installed model; what its manifest leaves open is as `known`."""
    known = known or Entry(manifest.name, license="")
    return replace(known, path=manifest.path, repo=manifest.repo or known.repo, revision=manifest.revision or known.revision,
                   release=manifest.release or known.release, quant=manifest.quant, license=manifest.license or known.license,
                   context=manifest.context, files=manifest.files, recipe=manifest.recipe)


def _found(entry: Entry) -> Entry:
    """The entry with its path, if it is here: inside the package, in the models folder, or in the hub's cache."""
    if entry.bundled:
        folder = paths.bundled(entry.name)
        return replace(entry, path=folder if (folder / "config.json").exists() else None)
    for manifest in store.manifests():
        if manifest.name == entry.name:
            return _of_manifest(manifest, entry)
    if not entry.repo or entry.recipe:
        return entry
    snapshot = store.hub_snapshot(entry.repo, entry.revision, entry.pick)
    if snapshot and (not entry.asked or store.commit_of(snapshot) == entry.revision):
        return replace(entry, path=snapshot, revision=store.commit_of(snapshot))
    return entry


def _at(path: Path) -> Entry:
    """An entry for a folder or file. A published config.json is recognised by its hash, whatever its folder's name."""
    path = path.resolve()
    config = path / "config.json"
    if path.is_dir() and not config.exists():
        raise UsageError(f"{path} holds no config.json, so it is not a checkpoint folder.",
                         "Give the folder that holds config.json and the .safetensors files, or a .gguf file.")
    if path.is_file() and path.suffix != ".gguf":
        raise UsageError(f"{path} is neither a checkpoint folder nor a .gguf file.", "Give one of the two.")
    twin = published(config) if config.exists() else None
    if path == paths.bundled("tiny").resolve():
        twin = catalog()["tiny"]
    if twin:
        return replace(twin, path=path)
    gguf = path.suffix == ".gguf"
    return Entry(path.stem if gguf else path.name, path, quant="gguf" if gguf else "official", license="")


def published(config: Path) -> Entry | None:
    """The known model whose config.json this is."""
    digest = _sha256(config)
    return next((entry for entry in catalog().values() if entry.config_sha256 == digest), None)


def _sha256(file: Path) -> str:
    import hashlib  # it brings OpenSSL, for which `list` and `show tiny` need not wait

    return hashlib.sha256(file.read_bytes()).hexdigest()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a file name may be, or with a zero byte
        return False


def _looks_like_path(name: str) -> bool:
    ends = name.endswith((".gguf", ".safetensors", "/"))
    return ends or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
