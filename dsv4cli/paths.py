"""Where things live on this machine: one function per folder, each overridable by one environment variable.

    DSV4_HOME       everything below, in one folder
    DSV4_MODELS     downloaded and quantised models
    DSV4_CACHE      things that can be made again
    DSV4_CONFIG     the settings file itself (config.toml)
    DSV4_SESSIONS   saved conversations and the input history

Without them the platform's own places are used (XDG on Linux). The Hugging Face hub's cache is only read, and found as
the hub finds it: HF_HUB_CACHE, HF_HOME/hub, XDG_CACHE_HOME/huggingface/hub. Functions, not constants: a test or
an embedding program may change the environment.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path | None:
    """DSV4_HOME, or None when the platform's folders are used."""
    return _from_env("DSV4_HOME")


def models() -> Path:
    return _folder("DSV4_MODELS", "models", "user_data_path")


def cache() -> Path:
    return _folder("DSV4_CACHE", "cache", "user_cache_path")


def config() -> Path:
    """The settings file, which need not exist."""
    return _from_env("DSV4_CONFIG") or _folder("", "", "user_config_path") / "config.toml"


def sessions() -> Path:
    return _folder("DSV4_SESSIONS", "sessions", "user_data_path")


def history() -> Path:
    """The lines typed into the chat, for the arrow keys."""
    return sessions() / "history"


def hub_cache() -> Path:
    for name, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if folder := _from_env(name):
            return folder / below
    base = _from_env("XDG_CACHE_HOME") or Path.home() / ".cache"
    return base / "huggingface" / "hub"


def bundled(name: str) -> Path:
    """A folder that ships inside the package, such as the embedded model."""
    return Path(__file__).parent / "assets" / name


def _folder(variable: str, below: str, platform_function: str) -> Path:
    if folder := _from_env(variable):
        return folder
    if root := home():
        return root / below
    import platformdirs  # 40 ms that most test runs and every DSV4_HOME user save

    base: Path = getattr(platformdirs, platform_function)("dsv4", appauthor=False)
    return base if platform_function == "user_cache_path" else base / below


def _from_env(name: str) -> Path | None:
    value = os.environ.get(name, "") if name else ""
    return Path(value).expanduser() if value else None
