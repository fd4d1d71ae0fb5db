"""What a completion consists of: the parts as they stream (`Delta`) and as a whole (`Completion`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DeltaKind = Literal["reasoning", "content", "tool_call"]


@dataclass(frozen=True)
class Delta:
    """The next piece of one part. Pieces of the same part, joined, are that part.

    A call begins with a delta that has its id and name and no text; those that follow bring fragments of its arguments,
    which joined are one JSON object (or the beginning of one, when the completion was cut off).
    """

    kind: DeltaKind
    text: str
    index: int | None = None
    id: str | None = None
    name: str | None = None


@dataclass
class ToolCall:
    """One call. `arguments` is JSON as the model wrote it: number formats and spacing are kept, nothing is validated."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Completion:
    """A completion taken apart. `exact` is all the text that came, markup and newlines included, to the byte."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    exact: str = ""
    finish_reason: str | None = None

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls in OpenAI's shape."""
        return [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.calls
        ]


def finish_reason(cause: str, calls: list[ToolCall]) -> str:
    """Calls are the reason of a completion that ended by itself; one that was cut off says so, calls or not."""
    if cause not in ("stop", "tool_calls"):
        return cause
    return "tool_calls" if calls else "stop"
