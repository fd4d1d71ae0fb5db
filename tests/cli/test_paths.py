"""Each folder's variable, one for all, and the hub's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4cli import paths


def test_one_variable_moves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_HOME", "/there")
    assert [paths.models(), paths.cache(), paths.sessions(), paths.config()] == [
        Path("/there/models"), Path("/there/cache"), Path("/there/sessions"), Path("/there/config.toml")]


@pytest.mark.parametrize(("variable", "folder"), [
    ("DSV4_MODELS", paths.models), ("DSV4_CACHE", paths.cache), ("DSV4_SESSIONS", paths.sessions), ("DSV4_CONFIG", paths.config)])
def test_each_has_its_own_variable(monkeypatch: pytest.MonkeyPatch, variable: str, folder: object) -> None:
    monkeypatch.setenv(variable, "~/elsewhere")
    assert folder() == Path.home() / "elsewhere"  # type: ignore[operator]


def test_without_variables_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSV4_HOME")
    found = [paths.models(), paths.cache(), paths.sessions(), paths.config()]
    assert len(set(found)) == 4
    assert all("dsv4" in folder.parts for folder in found)
    assert all(folder.is_relative_to(Path.home().parent) for folder in found)  # conftest's home and XDG folders


def test_the_hub_is_found_as_the_hub_finds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("HF_HOME")
    assert paths.hub_cache() == Path("/xdg/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert paths.hub_cache() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/cache")
    assert paths.hub_cache() == Path("/cache")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.hub_cache() == Path.home() / ".cache/huggingface/hub"
