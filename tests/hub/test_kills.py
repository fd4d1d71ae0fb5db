"""kill -9 at random moments (the long form: python -m tests.support.kills 200)."""

from __future__ import annotations

from pathlib import Path

from tests.support.hub import Hub
from tests.support.kills import as_published, survive


def test_five_kills_and_the_model_is_what_was_published(hub: Hub, published: Path, tmp_path: Path) -> None:
    (published / "inference/model.py").unlink()
    met = survive(5, hub, as_published(published), tmp_path / "models", seed=5)
    assert met["kills"] == 5
    assert met["killed with parts"] >= 2
    assert met["installations, byte for byte the same"] >= 1
