"""The chat's loop: read a line, answer it or obey it, again."""

from __future__ import annotations

from dsv4cli.chat import slash
from dsv4cli.chat.conversation import Conversation, Screen
from dsv4cli.errors import Dsv4Error

QUOTES = '"""'


def talk(chat: Conversation) -> None:
    """Talks until the user leaves. On a terminal errors are said and the chat goes on; from a pipe they end it."""
    chat.screen.header(chat.facts())
    warned = False
    while not chat.leaving:
        try:
            line = chat.screen.ask()
            warned = False
            _take(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not chat.screen.interactive:
                raise
            if warned:
                break
            warned = True
            chat.screen.note("Press Ctrl-C again or type /bye to leave.")
        except Dsv4Error as error:
            if not chat.screen.interactive:
                raise
            chat.screen.failed(error)


def _take(chat: Conversation, line: str) -> None:
    if line.startswith("/"):
        slash.obey(chat, line)
        return
    text = _whole(chat.screen, line) if line.lstrip().startswith(QUOTES) else line
    if text.strip():
        chat.say(text)


def _whole(screen: Screen, line: str) -> str:
    """The text that three quotes begin in `line` and end in this or a later line."""
    text = line.lstrip()[len(QUOTES):]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + screen.ask(continued=True)
    return text.rstrip()[: -len(QUOTES)].strip("\n")
