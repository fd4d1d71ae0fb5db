"""Typer, started lightly: its parser, its help and its completion, with less imported before they can work.

A command line should answer before one can doubt it, and Typer alone takes a fifth of a second where it imports all that
it might need. Kept out until they are needed: the commands that were not asked for (`add`), the library that converts
parameters, for parameters that are text, and the library that reads Markdown, for help (`Command`, `Group`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

AS_THEY_ARE = (str, bool, list[str])  # the parser yields them


def add(app: typer.Typer, name: str, where: str, help: str, hidden: bool = False) -> None:
    """Gives `app` the command `where` ("module:attribute", a function or a Typer of its own), imported when it is used.

    Until then it is a name and the first paragraph of its help, which is written down here a second time.
    """
    app.command(name, help=help, hidden=hidden, cls=type("Later", (_Later,), {"where": where}))(_not_yet)


def load(where: str, name: str | None = None) -> Any:
    """The command at "module:attribute", as Typer makes it."""
    module, _, attribute = where.partition(":")
    found = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False)
        found.command(name, cls=Command)(function)
    return typer.main.get_command(found)


class _Light:
    """What a command and a group of commands both import later."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _as_typed(super().get_params(ctx))  # type: ignore[misc]  # Typer's, which comes behind this class

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _import_help()
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Command(_Light, TyperCommand):
    """Typer's command, importing less."""


class Group(_Light, TyperGroup):
    """Typer's group of commands, likewise."""


class _Later(TyperCommand):
    """A command that is not imported yet. Whoever parses its arguments gets the context of the real one."""

    where = ""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load(self.where, info_name).make_context(info_name, args, parent, **extra)


def _not_yet() -> None:
    """Stands where Typer wants a function; `_Later` never calls it."""


def _as_typed(parameters: list[Any]) -> list[Any]:
    """Spares text and flags Typer's conversion, which imports pydantic even for an option that was not given."""
    for parameter in parameters:
        kind = getattr(parameter, "type_descriptor", None)  # inner names of Typer's: without them it converts as ever
        if kind is not None and kind.annotation in AS_THEY_ARE:
            parameter.get_runtime_param = _AsTyped
    return parameters


class _AsTyped:
    """Stands where Typer has its converter of a parameter."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """The value itself; where many values may be given, none of them is an empty tuple."""
        return () if value is None and (param.multiple or param.nargs == -1) else value


def _import_help() -> None:
    """Imports what prints the help. It imports readers of Markdown and of Python first; our help is neither."""
    with _put_off("rich.markdown", "Markdown"), _put_off("rich.traceback", "Traceback"):
        import_module("typer.rich_utils")


@contextmanager
def _put_off(module: str, name: str) -> Iterator[None]:
    """In here, `from module import name` yields a class that becomes the real one when something is made of it."""
    if module in sys.modules:
        yield
        return
    stand_in: Any = ModuleType(module)
    setattr(stand_in, name, _PutOff(name, (), {"where": (module, name)}))
    sys.modules[module] = stand_in
    try:
        yield
    finally:
        del sys.modules[module]


class _PutOff(type):
    """The type of a class that is not imported yet."""

    where: tuple[str, str]

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls.real()(*arguments, **options)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real(), name)

    def real(cls) -> Any:
        module, name = cls.where
        return getattr(import_module(module), name)
