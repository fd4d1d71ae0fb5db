"""What can be wrong with a model's files. Each error is a sentence with names and numbers, and a hint what to do."""

from __future__ import annotations


class QuantError(Exception):
    """A failure that the user can understand."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CorruptFile(QuantError):  # noqa: N818 - the name says what the file is
    """A file is missing, truncated, contradicts itself or does not fit its configuration."""

    exit_code = 4


class UnsupportedModel(QuantError):  # noqa: N818
    """A model of another architecture."""
