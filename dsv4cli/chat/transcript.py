"""What was said: the messages of a conversation, and the file they are kept in.

The file is JSON: {"format": "dsv4-transcript", "version": 1, "model", "release", "saved", "messages"}, where messages
are what the chat template takes: role, content, and for answers reasoning_content. Files are replaced whole or not at
all.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dsv4cli import paths
from dsv4cli.engine.atomic import whole_file
from dsv4cli.errors import CorruptError, UsageError

FORMAT, VERSION = "dsv4-transcript", 1
ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass
class Transcript:
    """A system prompt ("" for none) and the turns after it."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """What the model is shown."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    @property
    def question(self) -> str:
        """The user's last message, "" when there is none."""
        return next((turn["content"] for turn in reversed(self.turns) if turn["role"] == "user"), "")

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def answer(self, content: str, reasoning: str = "", tool_calls: list[dict[str, Any]] | None = None) -> None:
        message: Message = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if tool_calls:
            message["tool_calls"] = tool_calls
        self.turns.append(message)

    def undo(self) -> str:
        """Takes back the last question and everything after it, and returns the question ("" if there was none)."""
        question = self.question
        while self.turns and self.turns.pop()["role"] != "user":
            pass
        return question

    def clear(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self.turns.clear()


def save(transcript: Transcript, path: Path, *, model: str, release: str) -> None:
    """Writes the transcript to `path`, at once or not at all."""
    document = {"format": FORMAT, "version": VERSION, "model": model, "release": release,
                "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"), "messages": transcript.messages}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        draft.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Transcript:
    """Reads a saved transcript. Raises UsageError if there is none (naming the others), CorruptError for damage."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = ", ".join(saved(path.parent)) or "none yet"
        raise UsageError(f"There is no saved conversation {path.stem}.", f"Saved conversations: {others}.") from None
    except ValueError as error:
        raise CorruptError(f"{path} is damaged: {error}.", "Delete it, or restore it from a copy.") from None
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise CorruptError(f"{path} is not a conversation of this version of dsv4.", "Choose another one.")
    messages = document.get("messages")
    if not isinstance(messages, list) or not all(map(_valid, messages)):
        raise CorruptError(f"{path} is damaged: its messages are not a list of known roles and texts.", "Delete it.")
    has_system = bool(messages) and messages[0]["role"] == "system"
    return Transcript(messages[0]["content"] if has_system else "", messages[has_system:])


def saved(folder: Path) -> list[str]:
    """The names of the saved conversations."""
    return sorted(file.stem for file in folder.glob("*.json"))


def path_of(name: str) -> Path:
    """Where the conversation called `name` is kept. Raises UsageError for a name that is not a plain file name."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UsageError(f"{name!r} cannot be the name of a conversation.",
                         "Use letters, digits, dots, dashes and underscores.")
    return paths.sessions() / f"{name}.json"


def _valid(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
