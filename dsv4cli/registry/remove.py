"""Taking a model off this machine, so that it is never there by half."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dsv4cli import paths
from dsv4cli.errors import UsageError
from dsv4cli.registry import catalog, store
from dsv4cli.registry.catalog import Entry
from dsv4cli.registry.incoming import writing
from dsv4cli.registry.pull import locked


@dataclass(frozen=True)
class Removal:
    """What would go: folders of the models folder, a commit of the hub's cache, and the bytes that this frees."""

    name: str
    folders: tuple[Path, ...]
    snapshot: str | None
    nbytes: int


def removal(name: str) -> Removal:
    """What removing the model `name` means. Raises UsageError if it is not here, embedded, or lies elsewhere."""
    entry = catalog.resolve(name)
    if entry.bundled:
        raise UsageError(f"{entry.name} is part of dsv4 and goes with it.", "To remove dsv4: pip uninstall dsv4")
    below = paths.models() / store.INCOMING
    folder = store.folder_name(entry.name)
    folders = [path for path in (below / folder, below / f"{folder}.old", below / f"{folder}.repair") if path.is_dir()]
    snapshot, nbytes = None, 0
    if entry.path:
        installed = _installed_folder(entry)
        if installed:
            folders.append(installed)
        elif entry.revision and paths.hub_cache() in entry.path.parents:
            snapshot, nbytes = entry.revision, _freed_in_cache(entry.revision)
        else:
            raise UsageError(f"{entry.path} was not installed by dsv4 pull, so dsv4 does not remove it.", "Delete it yourself.")
    if not folders and not snapshot:
        raise UsageError(f"{entry.name} is not on this machine.", "dsv4 list shows what is.")
    return Removal(entry.name, tuple(folders), snapshot, nbytes + sum(map(_size, folders)))


def remove(what: Removal) -> None:
    """Raises Dsv4Error if another process works on the model, CapacityError (exit 3) if the disk refuses."""
    with locked(what.name), writing(paths.models()):
        for folder in what.folders:
            gone = paths.models() / store.INCOMING / f"{folder.name}.gone"
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder, gone)  # from here on it is no model; deleting takes a while
            shutil.rmtree(gone)
        if what.snapshot:
            from huggingface_hub import scan_cache_dir

            scan_cache_dir(paths.hub_cache()).delete_revisions(what.snapshot).execute()


def _installed_folder(entry: Entry) -> Path | None:
    """The folder of an installed model, which lies in the models folder and has a manifest."""
    return next((manifest.root for manifest in store.manifests() if manifest.path == entry.path), None)


def _freed_in_cache(commit: str) -> int:
    from huggingface_hub import scan_cache_dir

    return int(scan_cache_dir(paths.hub_cache()).delete_revisions(commit).expected_freed_size)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
