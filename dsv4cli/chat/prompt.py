"""The line that the user types: history, completion of /commands, Alt-Enter for a second line."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from dsv4cli import paths

PROMPT, CONTINUED = ">>> ", "... "


def reader(commands: Iterable[str]) -> Callable[[bool], str]:
    """Returns read(continued) -> the typed text. It raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
    session: PromptSession[str] = PromptSession(
        history=_history(), completer=_Commands(sorted(commands)), complete_while_typing=False, key_bindings=_keys(),
        multiline=True, prompt_continuation=CONTINUED, enable_history_search=False)
    return lambda continued: session.prompt(CONTINUED if continued else PROMPT)


def _keys() -> KeyBindings:
    """Enter sends. A pasted text keeps its lines, and Alt-Enter begins a new one."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("c-c")
    def drop(event: KeyPressEvent) -> None:
        """Ctrl-C drops what is typed; only on an empty line does it mean leaving."""
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    file = paths.history()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:  # a read-only home: the arrow keys still work within this conversation
        return InMemoryHistory()
    return FileHistory(str(file))


class _Commands(Completer):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and " " not in typed:
            yield from (Completion(name, -len(typed)) for name in self._names if name.startswith(typed))
