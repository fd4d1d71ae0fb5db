"""`dsv4 chat`: the conversation, on a terminal or from a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dsv4cli import console
from dsv4cli.commands.options import TALKING, with_settings
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.chat.conversation import Screen


@with_settings(*TALKING)
def chat(
    model: Annotated[str | None, typer.Argument(
        metavar="[MODEL]", show_default=False, help="The model to talk to.")] = None,
    session: Annotated[str | None, typer.Option(
        "--session", metavar="NAME", help="Go on with the conversation kept under this name, or begin it.")] = None,
    *,
    chosen: Settings,
) -> None:
    """Talk with a model. /help in the chat lists its commands.

    With stdin not a terminal, each line is a question and only the answers go to stdout.
    """
    from dsv4cli.chat import transcript
    from dsv4cli.chat.conversation import Conversation
    from dsv4cli.chat.loop import talk
    from dsv4cli.commands import opening

    path = transcript.path_of(session) if session else None
    said = transcript.load(path) if path and path.exists() else transcript.Transcript()
    if chosen["system"]:
        said.system = chosen["system"]
    engine = opening.open_engine(model or chosen["model"], chosen)
    talk(Conversation(engine, screen(chosen), chosen, lambda: opening.facts(engine), lambda: opening.details(engine),
                      session or "", said))


def screen(chosen: Settings) -> Screen:
    """The screen that fits stdin and stdout."""
    if not (sys.stdin.isatty() and console.coloured(sys.stdout)):
        from dsv4cli.chat.plain import PlainScreen

        return PlainScreen(chosen["quiet"])
    from dsv4cli.chat.prompt import reader
    from dsv4cli.chat.screen import TerminalScreen
    from dsv4cli.chat.slash import COMMANDS

    return TerminalScreen(reader(COMMANDS), chosen["quiet"])
