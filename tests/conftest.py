"""Every test runs in a home of its own: no test reads or writes the user's models, settings, sessions or hub cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # asked for when Triton is first imported, by whatever test that is


@pytest.fixture(scope="session")
def native_folder(pytestconfig: pytest.Config) -> Path:
    """Where the CPU kernels are compiled, once for all tests, the programs that they start, and runs to come."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("native"))


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operation is computed by its `ref`: for tests of the maths, and of what only exact products can promise."""
    from dsv4_kernels import backends

    monkeypatch.setattr(backends, "NATIVE", {})
    backends.pick.cache_clear()
    yield
    backends.pick.cache_clear()


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
             native_folder: Path) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("DSV4_")]:  # every setting can be chosen by a variable
        monkeypatch.delenv(name)
    for name in ("DSV4_HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.setenv(name, str(home / name.lower()))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DSV4_NATIVE_FOLDER", str(native_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home
