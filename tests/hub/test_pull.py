"""`dsv4 pull` against a hub that works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dsv4cli.registry import catalog, store
from tests.hub.conftest import REPO, assert_same, installed, shards
from tests.support.hub import Hub
from tests.support.program import Outcome

Run = Callable[..., Outcome]


def test_a_pull_installs_what_was_published(run_dsv4: Run, hub: Hub, published: Path) -> None:
    (published / "inference/model.py").unlink()
    done = run_dsv4("pull", REPO)
    assert (done.code, done.out) == (0, "")
    assert_same(published)
    assert len(hub.fetched()) == len(set(hub.fetched()))
    manifest = json.loads((installed() / store.MANIFEST).read_text())
    assert manifest["revision"] == hub.branches[REPO, "main"]
    assert [file["path"] for file in manifest["files"]] == sorted(
        (path.name for path in installed().iterdir() if path.name != store.MANIFEST), key=lambda name: (name.endswith("rs"), name))
    assert catalog.resolve(REPO).path == installed()
    assert len(shards(installed())) == 4
