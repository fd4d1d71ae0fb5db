"""Reads a block of tool calls while it is written, and writes each call's arguments as JSON.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Read tolerantly: only tags matter, whatever stands between them is skipped, a missing closer is implied by the next
opener, and attributes come in any order. A value ends at the first `</｜DSML｜` and nowhere else; quotes do not protect
it. `string="false"` values are JSON and are copied as they are; all others are text and become JSON strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

from dsv4cli.encoding.completion import Delta
from dsv4cli.encoding.texts import DSML

WRAPPERS = ("tool_calls", "function_calls", "calls")  # V4, V3.2, V4.1
ATTRIBUTE = re.compile(r'([\w-]+)\s*=\s*"([^"]*)"')


def quoted(text: str) -> str:
    """Text as a JSON string; characters outside ASCII are kept."""
    return json.dumps(text, ensure_ascii=False)


class CallReader:
    """Takes text and marks (`｜DSML｜`) from behind the block's first mark on; `ended` once the block is closed."""

    def __init__(self, call_id: Callable[[int], str]) -> None:
        self.ended = False
        self._call_id = call_id
        self._index = -1
        self._in_call = False
        self._first_key = True
        self._value_is_text = False
        self._place: Literal["tag", "value", "between"]
        self._tail: str  # the last two characters, or those of a value that may begin its closer
        self._begin_tag(closing=False)

    def text(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        while text and not self.ended:
            if self._place == "tag":
                text = self._read_tag(text, deltas)
            elif self._place == "value":
                text = self._read_value(text, deltas)
            else:
                self._tail, text = (self._tail + text)[-2:], ""
        return deltas

    def mark(self) -> list[Delta]:
        """A `｜DSML｜`. Behind `<` or `</` it begins a tag (in a value only behind `</`), elsewhere it is text."""
        closing = self._tail.endswith("</")
        if not closing and (self._place == "value" or not self._tail.endswith("<")):
            return self.text(DSML)
        deltas = [self._fragment('"')] if self._place == "value" and self._value_is_text else []
        self._begin_tag(closing)
        return deltas

    def flush(self) -> list[Delta]:
        """The completion was cut off: what was held back of a value is value; an unfinished tag is dropped."""
        held, self._tail = self._tail, ""
        return [self._fragment(self._spell(held))] if held and self._place == "value" else []

    def _begin_tag(self, closing: bool) -> None:
        self._place = "tag"
        self._closing = closing
        self._tag: list[str] = []
        self._in_quotes = False
        self._tail = ""

    def _read_tag(self, text: str, deltas: list[Delta]) -> str:
        """Collects a tag up to its `>`, which does not count between quotes; returns the rest of `text`."""
        for place, character in enumerate(text):
            if character == '"':
                self._in_quotes = not self._in_quotes
            elif character == ">" and not self._in_quotes:
                self._tag.append(text[:place])
                self._place, self._tail = "between", ""
                deltas += self._tag_read("".join(self._tag))
                return text[place + 1 :]
        self._tag.append(text)
        self._tail = (self._tail + text)[-2:]
        return ""

    def _tag_read(self, tag: str) -> list[Delta]:
        name = (tag.split(maxsplit=1) or [""])[0]
        attributes = dict(ATTRIBUTE.findall(tag))
        if self._closing:
            self.ended = name in WRAPPERS
            return self._close_call() if self.ended or name == "invoke" else []
        if name == "invoke" and "name" in attributes:
            return [*self._close_call(), self._open_call(attributes["name"])]
        if name == "parameter" and "name" in attributes and self._in_call:
            return [self._open_value(attributes["name"], attributes.get("string") != "false")]
        return []

    def _open_call(self, name: str) -> Delta:
        self._index += 1
        self._in_call = self._first_key = True
        return Delta("tool_call", "", self._index, self._call_id(self._index), name)

    def _close_call(self) -> list[Delta]:
        if not self._in_call:
            return []
        self._in_call = False
        return [self._fragment("{}" if self._first_key else "}")]

    def _open_value(self, key: str, is_text: bool) -> Delta:
        self._place, self._value_is_text = "value", is_text
        border, self._first_key = "{" if self._first_key else ", ", False
        return self._fragment(border + quoted(key) + (': "' if is_text else ": "))

    def _read_value(self, text: str, deltas: list[Delta]) -> str:
        text = self._tail + text
        self._tail = next((tail for tail in ("</", "<") if text.endswith(tail)), "")
        if value := text.removesuffix(self._tail):
            deltas.append(self._fragment(self._spell(value)))
        return ""

    def _spell(self, value: str) -> str:
        return quoted(value)[1:-1] if self._value_is_text else value

    def _fragment(self, text: str) -> Delta:
        return Delta("tool_call", text, self._index)
