"""`run_dsv4("list")` in this process, and `fake_engine` in the place of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsv4cli.commands import opening
from tests.support.fake_engine import FakeEngine
from tests.support.program import Outcome, dsv4


@pytest.fixture
def run_dsv4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    return lambda *arguments, **options: dsv4(capsys, monkeypatch, *arguments, **options)


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(opening, "open_engine", lambda model, chosen: engine)
    monkeypatch.setattr(opening, "facts", lambda engine: [("model", "fake")])
    return engine
