"""The options that commands share, made from the table of settings: names, help and ranges are written there once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from dsv4cli import settings
from dsv4cli.errors import UsageError

OPENING = ("ctx", "device", "vram", "threads", "numerics", "release")
SAMPLING = ("temp", "top_p", "min_p", "top_k", "repeat_penalty", "seed")
LENGTH = ("max_tokens", "think_budget", "stop")
TALKING = ("think", "system", *SAMPLING, *LENGTH, *OPENING, "stats", "quiet")

SHORT = {"system": "-s", "quiet": "-q"}
PANELS = {**dict.fromkeys(SAMPLING, "Sampling"), **dict.fromkeys(LENGTH, "Length"), **dict.fromkeys(OPENING, "Engine")}
METAVARS = {str: "TEXT", int: "N", float: "X", list: "TEXT", bool: ""}


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each named setting; they reach it together as `chosen`, a Settings.

    With "think" comes --effort, the word that DeepSeek's API has for the same choice.
    """
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def wrapped(**given: Any) -> None:
            flags = {name: given.pop(name) for name in names}
            if "think" in names:
                flags["think"] = _one_level(flags["think"], given.pop("effort"))
            command(**given, chosen=settings.load(flags))

        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "chosen"]
        options = [_option(name) for name in names]
        if "think" in names:
            options.insert(1, _effort())
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _option(name: str) -> inspect.Parameter:
    setting = settings.TABLE[name]
    kind = {list: list[str], bool: bool}.get(setting.kind, str)  # numbers are read by the settings, as from any source
    shown = setting.help if setting.default in (None, False) else f"{setting.help} Default: {setting.default}."
    flags = [settings.flag(name), *([SHORT[name]] if name in SHORT else [])]
    option = typer.Option(*flags, help=shown, show_default=False, rich_help_panel=PANELS.get(name),
                          metavar="|".join(setting.choices) or METAVARS[setting.kind])
    return _keyword(name, Annotated[Optional[kind], option])  # noqa: UP045 - built at run time


def _effort() -> inspect.Parameter:
    option = typer.Option("--effort", metavar="low|high|max", help="The API's word for --think.")
    return _keyword("effort", Annotated[Optional[str], option])  # noqa: UP045 - built at run time


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _one_level(think: str | None, effort: str | None) -> str | None:
    if effort == "off" or (think and effort and think != effort):
        raise UsageError(f"--think {think or 'high'} and --effort {effort} contradict each other.", "Give one of them.")
    return think or effort
