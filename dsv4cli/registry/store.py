"""Models on the disk: folders with a manifest in the models folder, and snapshots in the Hugging Face hub's cache.

The hub's cache is read by its published layout, models--OWNER--NAME/snapshots/COMMIT, without importing
huggingface_hub, which would be most of the start-up time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsv4cli import paths
from dsv4cli.errors import UsageError

MANIFEST = "manifest.json"
INCOMING = "incoming"  # in the models folder: models on their way in
KEYS = ("repo", "revision", "release", "quant", "license", "context", "recipe")
PART = re.compile(r"-(\d{5})-of-(\d{5})\.(safetensors|gguf)$")


@dataclass(frozen=True)
class Manifest:
    """What a finished model folder says about itself. A folder without one does not count as a model.

    context   the longest that the model was made for, in tokens; 0 where nobody wrote it down
    recipe    of a GGUF that was made here of the repo's checkpoint, with what; empty for what was fetched as it is
    files     path -> (size, SHA-256) of everything that was installed; empty for a model that was put there by hand
    """

    name: str
    path: Path
    repo: str | None = None
    revision: str | None = None
    release: str | None = None
    quant: str = "official"
    license: str = ""
    context: int = 0
    recipe: str = ""
    files: tuple[tuple[str, int, str], ...] = ()

    @property
    def root(self) -> Path:
        """The model's folder in the models folder; `path` may be a GGUF inside it."""
        return paths.models() / self.path.relative_to(paths.models()).parts[0]


def folder_name(name: str) -> str:
    """The folder of a model called `name`, in the models folder."""
    return name.replace("/", "--").replace(":", "+")


def name_of(folder: Path) -> str:
    """The model whose folder this is; what `folder_name` does, undone."""
    return folder.name.replace("--", "/").replace("+", ":")


def unfinished() -> Iterator[Path]:
    """Folders of models on their way in."""
    for folder in sorted((paths.models() / INCOMING).glob("*")):
        if folder.is_dir() and not folder.name.endswith((".old", ".repair", ".gone")):
            yield folder


def manifests(folder: Path | None = None) -> Iterator[Manifest]:
    """The finished models in the models folder (or another), by folder. One with a damaged manifest counts as unfinished."""
    folder = folder or paths.models()
    for file in sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else ():
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            known: dict[str, Any] = {key: fields[key] for key in KEYS if fields.get(key)}
            known["files"] = tuple((entry["path"], entry["size"], entry["sha256"]) for entry in fields.get("files", ()))
            yield Manifest(str(fields.get("name") or file.parent.name), file.parent / fields.get("file", ""), **known)
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            continue


def hub_snapshot(repo: str, revision: str | None = None, pick: str = "") -> Path | None:
    """The checkpoint folder or .gguf of owner/repo in the hub's cache: the wanted commit, else main's, else the newest.

    `pick` names a GGUF among several, as for `ggufs`; without it, UsageError is raised for several.
    """
    folder = paths.hub_cache() / f"models--{repo.replace('/', '--')}"
    wanted = [folder / "snapshots" / commit for commit in (revision, _main(folder)) if commit]
    others = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for snapshot in (*wanted, *others):
        if not pick and (snapshot / "config.json").exists() and complete(snapshot):
            return snapshot
        if model := _gguf(snapshot, repo, pick):
            return model
    return None


def commit_of(snapshot: Path) -> str:
    """The commit of a path that `hub_snapshot` returned."""
    return snapshot.parent.name if snapshot.suffix == ".gguf" else snapshot.name


def complete(folder: Path) -> bool:
    """Whether every shard that the file names promise is there. (What is inside them, the reader checks.)"""
    shards = list(folder.glob("*.safetensors"))
    promised = {int(match[2]) for shard in shards if (match := PART.search(shard.name))}
    return bool(shards) and (not promised or len(shards) >= max(promised))


def size(path: Path) -> int:
    """Bytes of a model's weight files: the shards of a folder, or all parts of a split GGUF."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if match := PART.search(path.name):
        parts = path.parent.glob(f"{path.name[:match.start()]}-*-of-{match[2]}.gguf")
        return sum(file.stat().st_size for file in parts)
    return path.stat().st_size


def _main(folder: Path) -> str | None:
    ref = folder / "refs" / "main"
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def ggufs(names: list[str], pick: str = "") -> list[str]:
    """Of file names, the GGUF models (of a split one its first part) that `pick` means: a file, or a quantisation in it."""
    first = [name for name in sorted(names) if name.endswith(".gguf") and (not (part := PART.search(name)) or part[1] == "00001")]
    if not pick:
        return first
    exact = [name for name in first if pick in (name, name.rpartition("/")[2], PART.sub(r".gguf", name))]
    for inner in ("a-z0-9_", "a-z0-9"):  # q4_k is Q4_K, and where there is none, Q4_K_M
        word = re.compile(rf"(?<![a-z0-9]){re.escape(pick.lower())}(?![{inner}])")
        exact = exact or [name for name in first if word.search(name.lower())]
    return exact


def parts_of(name: str, names: list[str]) -> list[str]:
    """All parts of the GGUF model whose (first) file is `name`."""
    match = PART.search(name)
    if not match:
        return [name]
    pattern = re.compile(rf"{re.escape(name[: match.start()])}-\d{{5}}-of-{match[2]}\.gguf")
    return [other for other in sorted(names) if pattern.fullmatch(other)]


def one_gguf(repo: str, names: list[str], pick: str, where: str) -> str | None:
    """The single GGUF model that is meant, or None without any. Raises UsageError for several, or none like `pick`."""
    all_models, first = ggufs(names), ggufs(names, pick)
    if len(first) > 1:
        raise UsageError(f"{repo} holds {len(first)} models: {', '.join(first)}.", where)
    if pick and all_models and not first:
        close = get_close_matches(pick.lower(), [name.lower() for name in all_models], n=3, cutoff=0.1)
        nearest = [name for name in all_models if name.lower() in close] or all_models
        raise UsageError(f"{repo} holds no {pick}.", f"It holds {', '.join(nearest)}.")
    return first[0] if first else None


def _gguf(snapshot: Path, repo: str, pick: str) -> Path | None:
    names = [file.name for file in snapshot.glob("*.gguf")]
    if pick and not ggufs(names, pick):
        return None
    first = one_gguf(repo, names, pick, f"Give the path of one of them; they are in {snapshot}.")
    return snapshot / first if first else None
