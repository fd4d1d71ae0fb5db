"""The grammar of a well-formed completion, to the byte: what the model was trained to write. Any deviation is an error.

Used to check stored completions and the template's own output; what a model really says goes through `parser.py`.
"""

from __future__ import annotations

import re

from dsv4cli.encoding.completion import Completion, ToolCall, finish_reason
from dsv4cli.encoding.dsml import quoted
from dsv4cli.encoding.texts import BOS, DSML, END_THINK, EOS, THINK
from dsv4cli.errors import Dsv4Error

BLOCK = f"\n\n<{DSML}tool_calls"
FORBIDDEN = (BOS, EOS, THINK, END_THINK, DSML)
NOT_CLOSER = f"(?:(?!</{DSML}).)*?"  # a name or value may hold anything else, newlines included

OPEN_BLOCK = re.compile(">\n")
OPEN_CALL = re.compile(rf'<{DSML}invoke\s*name="(.*?)">\n')
PARAMETER = re.compile(
    rf'<{DSML}parameter name="({NOT_CLOSER})" string="(true|false)">({NOT_CLOSER})</{DSML}parameter>\n', re.DOTALL
)
CLOSE_CALL = re.compile(f"\n?</{DSML}invoke>\n")
CLOSE_BLOCK = re.compile(rf"</{DSML}tool_calls>\Z")


def parse_strict(text: str, thinking: bool) -> Completion:
    """Parses a whole completion, EOS included; no newline is trimmed. Raises Dsv4Error at the first deviation."""
    if not text.endswith(EOS):
        raise _error(f"it does not end with {EOS}")
    reasoning, body = "", text[: -len(EOS)]
    if thinking:
        reasoning, closer, body = body.partition(END_THINK)
        if not closer:
            raise _error(f"the reasoning is not closed by {END_THINK}")
    content, opener, block = body.partition(BLOCK)
    for name, part in (("reasoning", reasoning), ("answer", content)):
        if found := next((spelling for spelling in FORBIDDEN if spelling in part), None):
            raise _error(f"the {name} contains {found}")
    calls = _Block(block).calls() if opener else []
    return Completion(reasoning, content, calls, text, finish_reason("stop", calls))


class _Block:
    """A cursor over a block of calls, from behind `<｜DSML｜tool_calls` to its end."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def calls(self) -> list[ToolCall]:
        self._demand(OPEN_BLOCK, "'>' and a newline after tool_calls")
        calls: list[ToolCall] = []
        while opened := self._take(OPEN_CALL):
            arguments = self._arguments()
            self._demand(CLOSE_CALL, "a parameter or the end of the call")
            calls.append(ToolCall(f"call_{len(calls):02d}", opened[1], arguments))
        self._demand(CLOSE_BLOCK, f"a call or </{DSML}tool_calls> and {EOS}")
        return calls

    def _arguments(self) -> str:
        pairs: dict[str, str] = {}
        while found := self._take(PARAMETER):
            key, is_text, value = found.groups()
            if key in pairs:
                raise _error(f"the parameter {key!r} stands there twice")
            pairs[key] = f"{quoted(key)}: {quoted(value) if is_text == 'true' else value}"
        return "{" + ", ".join(pairs.values()) + "}"

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found

    def _demand(self, pattern: re.Pattern[str], what: str) -> None:
        if not self._take(pattern):
            raise _error(f"expected {what}, found {self._text[self._at : self._at + 40]!r}")


def _error(what: str) -> Dsv4Error:
    return Dsv4Error(f"The completion is not well-formed: {what}.", "CompletionParser reads it tolerantly.")
