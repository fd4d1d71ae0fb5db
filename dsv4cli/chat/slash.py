"""The chat's own commands, which begin with a slash and never reach the model."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from dsv4cli import settings
from dsv4cli.chat import transcript, turn
from dsv4cli.chat.conversation import Conversation
from dsv4cli.encoding.template import think_level
from dsv4cli.errors import UsageError

FIXED = ("model", "ctx", "device", "threads", "numerics", "release")  # chosen when the model is opened
LEVELS = settings.TABLE["think"].choices


class Slash(NamedTuple):
    """A command: what it does, given the chat and the text behind its name; how it is written; a line of help."""

    run: Callable[[Conversation, str], None]
    usage: str
    help: str


def obey(chat: Conversation, line: str) -> None:
    """Runs the command in `line`. Raises UsageError for one that does not exist, with the nearest name."""
    name, _, rest = line.strip().partition(" ")
    name = ALIASES.get(name.lower(), name.lower())
    if name not in COMMANDS:
        close = get_close_matches(name, [*COMMANDS, *ALIASES], n=1, cutoff=0.4)
        raise UsageError(f"There is no command {name}, and nothing was sent to the model.",
                         f"Did you mean {close[0]}?" if close else "/help lists them; a leading space sends it.")
    COMMANDS[name].run(chat, rest.strip())


def _help(chat: Conversation, rest: str) -> None:
    chat.screen.table([*((command.usage, command.help) for command in COMMANDS.values()),
                       ('"""', "begins a text of several lines; the same ends it"),
                       ("Alt-Enter", "a new line; Ctrl-C stops the answer, Ctrl-D leaves")])


def _think(chat: Conversation, rest: str) -> None:
    if rest:
        chat.settings = chat.settings.changed("think", rest, "/think")
    level = chat.settings["think"]
    thinking, effort = think_level(level, chat.engine.release)
    other = f" (release {chat.engine.release} has no {level})" if thinking and effort != level else ""
    chat.screen.note(f"Thinking is {f'at {effort}' if thinking else 'off'}{other}.")


def _system(chat: Conversation, rest: str) -> None:
    if rest:
        chat.transcript.system = "" if rest.lower() == "off" else rest
    text = chat.transcript.system
    chat.screen.note(f"System prompt: {text}" if text else "There is no system prompt.")


def _clear(chat: Conversation, rest: str) -> None:
    chat.forget()
    chat.name = ""
    chat.screen.note("The conversation is forgotten; the system prompt stays." if chat.transcript.system else
                     "The conversation is forgotten.")


def _regen(chat: Conversation, rest: str) -> None:
    if not chat.transcript.question:
        raise UsageError("There is no question to answer again.")
    chat.regenerate()


def _undo(chat: Conversation, rest: str) -> None:
    question = chat.transcript.undo()
    if not question:
        raise UsageError("There is nothing to take back.")
    chat.screen.note(f"Taken back: {_short(question)}")


def _save(chat: Conversation, rest: str) -> None:
    name = _wanted(rest or chat.name, "/save NAME")
    path = transcript.path_of(name)
    if path.exists() and name != chat.name:
        raise UsageError(f"There is already a conversation {name}.", f"Choose another name, or delete {path}.")
    chat.keep(name)
    chat.screen.note(f"Saved as {name}, and kept after every answer: {path}")


def _load(chat: Conversation, rest: str) -> None:
    name = _wanted(rest, "/load NAME")
    loaded = transcript.load(transcript.path_of(name))
    chat.forget()
    chat.transcript, chat.name = loaded, name
    chat.screen.note(f"Loaded {name}: {_count(len(loaded.turns), 'message')}. {_last_words(loaded)}".rstrip())


def _read(chat: Conversation, rest: str) -> None:
    try:
        words = shlex.split(rest)
    except ValueError:
        words = []
    if not words:
        raise UsageError("/read needs the name of a file.", 'If it has blanks, quote it: /read "my notes.txt" QUESTION')
    name, *question = words
    text = _text_of(Path(name).expanduser())
    chat.attached = f"{chat.attached}\n\n{text}" if chat.attached else text
    if question:
        chat.say(" ".join(question))
    else:
        chat.screen.note(f"Read {name}, {_count(len(text), 'character')}. It goes with your next message.")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise UsageError(f"{file} is not text in UTF-8: {where}.") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from None


def _status(chat: Conversation, rest: str) -> None:
    last = chat.last.last if chat.last else None
    used = chat.session.position
    rows = [("messages", str(len(chat.transcript.turns))),
            ("context", f"{used:,} of {turn.tokens(chat.engine.ctx)} used, {chat.engine.ctx - used:,} free"),
            ("thinking", chat.settings["think"]),
            ("system", chat.transcript.system or "none"),
            ("saved as", chat.name or "not saved")]
    if last:
        rows += [("last answer", turn.rates(last))]
    chat.screen.table(rows)


def _set(chat: Conversation, rest: str) -> None:
    name, _, value = rest.partition(" ")
    if not name:
        free = [key for key in chat.settings if key not in FIXED]
        chat.screen.table([(key, _shown(chat, key)) for key in free])
        return
    settings.lookup(name, settings.TABLE)
    if name in FIXED:
        raise UsageError(f"{name} is chosen when the model is opened.",
                         f"Leave with /bye and start again with {settings.flag(name)}.")
    if name == "system":
        _system(chat, value.strip())
        return
    if value:
        value = value.strip()
        before = chat.settings
        chosen = before.without(name) if value == "default" else before.changed(name, value, f"/set {name}")
        turn.sampling(chat.engine, chosen)  # refuses what the sampler would refuse, now and not in the middle of the next answer
        chat.settings = chosen
    chat.screen.note(f"{name} is {_shown(chat, name)}.")


def _show(chat: Conversation, rest: str) -> None:
    chat.screen.table(chat.details())


def _bye(chat: Conversation, rest: str) -> None:
    chat.leaving = True


COMMANDS = {
    "/help": Slash(_help, "/help", "this list (also /?)"),
    "/think": Slash(_think, f"/think {'|'.join(LEVELS)}", "how hard to think before answering"),
    "/system": Slash(_system, "/system TEXT", "set the system prompt; /system off removes it"),
    "/clear": Slash(_clear, "/clear", "forget the conversation"),
    "/regen": Slash(_regen, "/regen", "answer the last question again"),
    "/undo": Slash(_undo, "/undo", "take back the last question and its answer"),
    "/save": Slash(_save, "/save NAME", "keep the conversation, now and after every answer"),
    "/load": Slash(_load, "/load NAME", "go on with a kept conversation"),
    "/read": Slash(_read, "/read FILE [QUESTION]", "put a file's text before your next message, or ask at once"),
    "/status": Slash(_status, "/status", "context used, thinking, rates of the last answer"),
    "/set": Slash(_set, "/set [NAME VALUE]", "sampling and lengths, such as /set temp 0.6; /set stats on"),
    "/show": Slash(_show, "/show", "the model"),
    "/bye": Slash(_bye, "/bye", "leave (also /exit, /quit)"),
}
ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}


def _wanted(name: str, usage: str) -> str:
    if not name:
        kept = ", ".join(transcript.saved(transcript.path_of("x").parent)) or "none yet"
        raise UsageError(f"A name is missing: {usage}.", f"Kept conversations: {kept}.")
    return name


def _shown(chat: Conversation, name: str) -> str:
    value = chat.settings[name]
    if value is None and name in turn.SAMPLING:
        value = getattr(chat.engine.sampling, turn.SAMPLING[name])
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(repr, value))
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _last_words(loaded: transcript.Transcript) -> str:
    return f"The last question was: {_short(loaded.question)}" if loaded.question else ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


