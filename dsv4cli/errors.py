"""Errors that the command line prints as a sentence and a hint. Each class is one exit code."""

from __future__ import annotations


class Dsv4Error(Exception):
    """Something that the user can understand: what is wrong (with names and numbers), and what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(Dsv4Error):
    """The program was asked for something it does not offer: a wrong name, option, value or input."""

    exit_code = 2


class CapacityError(Dsv4Error):
    """Not enough memory or disk; the message has both numbers."""

    exit_code = 3


class CorruptError(Dsv4Error):
    """A file is incomplete or damaged."""

    exit_code = 4


class Interrupted(Dsv4Error):  # noqa: N818 - an outcome, not a mistake
    """Stopped by the user."""

    exit_code = 130
