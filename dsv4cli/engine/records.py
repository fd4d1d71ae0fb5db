"""The one record per generated token. Chat, run --json and the Python API all read it; nobody counts for himself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["reasoning", "answer", "tool_call"]
Finish = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class Token:
    """One generated token and the state of the stream after it.

    id              the token; None only in a closing record that brings none (cancelled, or no room for a single token)
    text            text that became certain with this token: often its own, empty while held back (an unfinished UTF-8
                    character, newlines before a possible marker, the beginning of a possible stop string), or more
    kind            where the text belongs; for "tool_call" the text is a fragment of the arguments' JSON
    index           0 for the first generated token
    prompt_tokens   tokens in the prompt, of which cached_tokens were already in the session
    *_seconds       wall-clock seconds spent on the prompt, and on decoding since
    *_tok_s         tokens computed (not cached) per second; decode counts from the second token on
    memory_bytes    weights plus state, in bytes; rss_bytes is the process's resident memory (0 where unknown)
    tool_calls      complete on the final record: [{"id", "type": "function", "function": {"name", "arguments"}}]
    finish          None until the final record
    unrecorded      why decoded tokens are described one by one and not replayed; None where they are
    """

    id: int | None
    text: str
    kind: Kind
    index: int
    prompt_tokens: int
    cached_tokens: int
    prompt_seconds: float
    decode_seconds: float
    prompt_tok_s: float
    decode_tok_s: float
    memory_bytes: int
    rss_bytes: int = 0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish: Finish | None = None
    unrecorded: str | None = None
