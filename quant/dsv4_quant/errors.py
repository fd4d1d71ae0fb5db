"""What can be wrong with a model's files. Each error is a sentence with names and numbers, and a hint what to do."""

from __future__ import annotations

LONGEST = 600  # characters of a message: a hostile file may call a tensor by a name of megabytes


class QuantError(Exception):
    """A failure that the user can understand."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _printable(message)
        super().__init__(self.message)
        self.hint = hint


class CorruptFile(QuantError):  # noqa: N818 - the name says what the file is
    """A file is missing, truncated, contradicts itself or does not fit its configuration."""

    exit_code = 4


class UnsupportedModel(QuantError):  # noqa: N818
    """A model of another architecture."""


class WrongUse(QuantError):  # noqa: N818
    """Something was asked for that does not exist or does not fit: a type, a role, a size."""

    exit_code = 2


class NotEnoughRoom(QuantError):  # noqa: N818
    """The disk is too small; the message has both numbers."""

    exit_code = 3


def _printable(message: str) -> str:
    """One line that is safe on a terminal, whatever names and values out of the file stand in it."""
    if len(message) > LONGEST:
        message = f"{message[: LONGEST * 2 // 3]} ... {message[-LONGEST // 3 :]}"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in message)
