"""Models on the disk: folders with a manifest in the models folder, and snapshots in the Hugging Face hub's cache.

The hub's cache is read by its published layout, models--OWNER--NAME/snapshots/COMMIT, without importing
huggingface_hub, which would be most of the start-up time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4cli import paths
from dsv4cli.errors import UsageError

MANIFEST = "manifest.json"
PART = re.compile(r"-(\d{5})-of-(\d{5})\.(safetensors|gguf)$")


@dataclass(frozen=True)
class Manifest:
    """What a finished model folder says about itself. A folder without one does not count as a model."""

    name: str
    path: Path
    repo: str | None = None
    revision: str | None = None
    release: str | None = None
    quant: str = "official"
    license: str = ""


def manifests() -> Iterator[Manifest]:
    """The finished models in the models folder, by folder. One with a damaged manifest counts as unfinished."""
    folder = paths.models()
    for file in sorted(folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else ():
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            known = {key: fields[key] for key in ("repo", "revision", "release", "quant", "license") if fields.get(key)}
            yield Manifest(str(fields.get("name") or file.parent.name), file.parent / fields.get("file", ""), **known)
        except (OSError, ValueError, AttributeError, TypeError):
            continue


def hub_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The checkpoint folder or .gguf of owner/repo in the hub's cache: the wanted commit, else main's, else the newest.

    Raises UsageError if the snapshot holds several GGUF files and nothing says which.
    """
    folder = paths.hub_cache() / f"models--{repo.replace('/', '--')}"
    wanted = [folder / "snapshots" / commit for commit in (revision, _main(folder)) if commit]
    others = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for snapshot in (*wanted, *others):
        if (snapshot / "config.json").exists() and complete(snapshot):
            return snapshot
        if model := _gguf(snapshot, repo):
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


def _gguf(snapshot: Path, repo: str) -> Path | None:
    files = [(file, PART.search(file.name)) for file in sorted(snapshot.glob("*.gguf"))]
    first = [file for file, part in files if not part or part[1] == "00001"]
    if len(first) > 1:
        raise UsageError(f"{repo} holds {len(first)} models: {', '.join(file.name for file in first)}.",
                         f"Give the path of one of them; they are in {snapshot}.")
    return first[0] if first else None
