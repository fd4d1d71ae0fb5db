"""What the user may choose: a table of settings, and the values in force with their origins.

A value comes from, weakest first: the default, config.toml, the environment (DSV4_TOP_P for top_p), a flag (--top-p),
and in the chat from /set. `None` means that nobody chose: then the engine decides, for sampling by what the model's authors
recommend.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dsv4cli import paths
from dsv4cli.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

YES, NO = {"on", "true", "yes", "1"}, {"off", "false", "no", "0"}


@dataclass(frozen=True)
class Setting:
    """One thing to choose. kind is str, int, float, bool or list (of str); low and high are inclusive.

    `also` are words that are taken beside the choices without being advertised.
    """

    kind: type
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    also: tuple[str, ...] = ()

    def parse(self, raw: Any, where: str) -> Any:
        """The value of `raw` (text, or already typed). Raises UsageError: `where` it came from, what is allowed."""
        try:
            value = _convert(self.kind, raw)
        except (TypeError, ValueError):
            raise UsageError(f"{where} is {raw!r}, but it must be {self.wanted()}.") from None
        within = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        if (self.choices and value not in self.choices + self.also) or not within:
            raise UsageError(f"{where} is {raw!r}, but it must be {self.wanted()}.")
        return value

    def wanted(self) -> str:
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        kind = {str: "text", int: "a whole number", float: "a number", bool: "on or off", list: "texts"}[self.kind]
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:g} to {self.high:g}"
        return kind if self.low is None else f"{kind}, {self.low:g} or more"


TABLE: dict[str, Setting] = {
    "model": Setting(str, "Model to use when none is named.", "tiny"),
    "think": Setting(str, "How hard to think before answering.", "high", ("off", "low", "high", "max"),
                     also=("none", "minimal", "medium", "xhigh", "ultra")),  # the words of DeepSeek's API
    "system": Setting(str, "System prompt."),
    "temp": Setting(float, "Temperature; 0 always takes the likeliest token.", low=0, high=100),
    "top_p": Setting(float, "Keep the likeliest tokens that reach this probability together; 1: all.", low=0, high=1),
    "min_p": Setting(float, "Drop tokens less likely than this fraction of the likeliest; 0: none.", low=0, high=1),
    "top_k": Setting(int, "Keep this many of the likeliest tokens; 0: all.", low=0),
    "repeat_penalty": Setting(float, "Make tokens that were already used less likely; 1 is off.", low=0.1, high=10),
    "seed": Setting(int, "The same seed gives the same answer.", low=0, high=2**63 - 1),
    "max_tokens": Setting(int, "Longest answer in tokens, reasoning included.", low=1),
    "think_budget": Setting(int, "Longest reasoning in tokens; then the answer begins.", low=0),
    "stop": Setting(list, "End the answer before this text (may be given several times)."),
    "ctx": Setting(int, "Context in tokens: question, reasoning and answer together.", low=1),
    "device": Setting(str, "Where to compute: auto, cpu or cuda."),
    "vram": Setting(str, "Most memory to use of the GPU, like 20GB."),
    "threads": Setting(int, "CPU threads.", low=1),
    "numerics": Setting(str, "official: as DeepSeek's own code rounds its caches; plain: without that rounding.",
                        choices=("plain", "official")),
    "release": Setting(str, "Chat format of the model's release.", choices=("april", "0731")),
    "stats": Setting(bool, "Print prompt and decode rates after each answer.", False),
    "quiet": Setting(bool, "Print the answer alone.", False),
}


@dataclass(frozen=True)
class Value:
    """A value in force, and where it was chosen: "default", the settings file, a variable, a flag or "/set"."""

    value: Any
    origin: str


class Settings(Mapping[str, Any]):
    """The values in force by name. Immutable: `changed` makes another."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def origin(self, name: str) -> str:
        return self._values[name].origin

    def chosen(self, *names: str) -> dict[str, Any]:
        """Of these settings, the ones that somebody chose: keyword arguments for whoever owns the other defaults."""
        return {name: self[name] for name in names if self[name] is not None}

    def changed(self, name: str, raw: Any, where: str) -> Settings:
        """These settings with one other value; raises UsageError for an unknown name or a value out of range."""
        return Settings({**self._values, name: Value(lookup(name, TABLE).parse(raw, where), where)})

    def without(self, name: str) -> Settings:
        """These settings with `name` back at its default."""
        return Settings({**self._values, name: Value(lookup(name, TABLE).default, "default")})


def load(flags: Mapping[str, Any] | None = None) -> Settings:
    """The settings in force. `flags` has the command line's values by name; None or an empty list means "not given".

    Raises UsageError for a broken settings file, an unknown key in it, and values out of range, naming the source.
    """
    values = {name: Value(setting.default, "default") for name, setting in TABLE.items()}
    for name, raw, origin in (*_from_file(), *_from_environment(), *_from_flags(flags or {})):
        values[name] = Value(lookup(name, TABLE, origin).parse(raw, origin), origin)
    return Settings(values)


def lookup(name: str, table: Mapping[str, Any], where: str = "") -> Any:
    """table[name], or UsageError with the nearest name."""
    if name in table:
        return table[name]
    close = get_close_matches(name, table, n=1, cutoff=0.5)
    raise UsageError(f"There is no setting {name}{f' ({where})' if where else ''}.",
                     f"Did you mean {close[0]}?" if close else f"Settings: {', '.join(table)}.")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_file() -> Iterable[tuple[str, Any, str]]:
    file = paths.config()
    try:
        chosen = tomllib.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"The settings file {file} cannot be read: {error}.", "Correct it or delete it.") from error
    return [(key, raw, f"{key} in {file}") for key, raw in chosen.items()]


def _from_environment() -> Iterator[tuple[str, Any, str]]:
    for name, setting in TABLE.items():
        variable = f"DSV4_{name.upper()}"
        if raw := os.environ.get(variable):
            yield name, [raw] if setting.kind is list else raw, variable


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, raw in flags.items():
        if raw is not None and raw != []:
            yield name, raw, flag(name)


def _convert(kind: type, raw: Any) -> Any:
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if str(raw).lower() in YES | NO:
            return str(raw).lower() in YES
        raise ValueError(raw)
    if kind is list:
        return tuple(_convert(str, item) for item in ([raw] if isinstance(raw, str) else raw))
    if isinstance(raw, bool) or not isinstance(raw, (str, int, float)):
        raise TypeError(raw)
    if kind is str:
        if not isinstance(raw, str):
            raise TypeError(raw)
        return raw
    value = kind(raw)
    if not math.isfinite(value) or (isinstance(raw, float) and value != raw):
        raise ValueError(raw)
    return value
