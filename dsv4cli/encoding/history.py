"""What happens to a conversation before it is rendered: users and tools merged, results ordered, old reasoning dropped.

Everything here works on plain message dictionaries (OpenAI's shape) and returns new ones; a merged user block carries
its pieces under `parts`, each `("text" | "result", text, call id)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv4cli.errors import UsageError

Message = dict[str, Any]
ASKERS = ("user", "developer")


def flat_text(content: object) -> str:
    """Content as text: None is empty, a list's text parts are joined by a blank line, other parts are named."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n\n".join(map(_part_text, content))
    raise UsageError(f"A message's content is {type(content).__name__}.", "Use a string or a list of parts.")


def _part_text(part: object) -> str:
    if not isinstance(part, dict):
        raise UsageError(
            f"A part of a message's content is {type(part).__name__}.", 'Use {"type": "text", "text": ...}.'
        )
    return flat_text(part.get("text")) if part.get("type") == "text" else f"[Unsupported {part.get('type')}]"


def demand_messages(messages: Sequence[Message]) -> None:
    """Raises UsageError unless all messages, and the calls in them, have the outer shape that OpenAI gives them."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UsageError(f"Message {number} is {type(message).__name__}.", 'Use {"role": ..., "content": ...}.')
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise UsageError(f"A call in message {number} has no function name.", "Use OpenAI's tool_calls.")


def declare_tools(messages: Sequence[Message], tools: Sequence[Message] | None) -> list[Message]:
    """Attaches the request's tools to the first system message; without one, an empty system message comes first."""
    found = [dict(message) for message in messages]
    if not tools:
        return found
    system = next((message for message in found if message.get("role") == "system"), None)
    if system is None:
        system = {"role": "system", "content": ""}
        found.insert(0, system)
    system["tools"] = list(tools)
    return found


def merge_users(messages: Sequence[Message]) -> list[Message]:
    """Joins neighbouring user and tool messages into one block. A task closes its block to a further user message."""
    merged: list[Message] = []
    for message in messages:
        role = message.get("role")
        if role not in ("user", "tool"):
            merged.append(dict(message))
            continue
        kind = "result" if role == "tool" else "text"
        part = (kind, flat_text(message.get("content")), message.get("tool_call_id"))
        last = merged[-1] if merged else None
        if last is not None and "parts" in last and not (role == "user" and last.get("task")):
            last["parts"].append(part)
            if message.get("task"):
                last["task"] = message["task"]
        else:
            merged.append({**message, "role": "user", "parts": [part]})
    return merged


def order_results(messages: Sequence[Message]) -> list[Message]:
    """Sorts each block's tool results by the latest assistant's calls; texts keep their places, unknown ids sort first."""
    order: dict[str, int] = {}
    for message in messages:
        if message.get("role") == "assistant" and message.get("tool_calls"):
            ids = [call.get("id") for call in message["tool_calls"]]
            order = {name: place for place, name in enumerate(ids) if name}
        elif "parts" in message and order:
            results = sorted((p for p in message["parts"] if p[0] == "result"), key=lambda p: order.get(p[2] or "", 0))
            slots = iter(results)
            message["parts"] = [next(slots) if part[0] == "result" else part for part in message["parts"]]
    return list(messages)


def last_question(messages: Sequence[Message]) -> int:
    """Index of the last user or developer message; -1 without one."""
    return max((i for i, message in enumerate(messages) if message.get("role") in ASKERS), default=-1)


def drop_old_reasoning(messages: Sequence[Message], border: int) -> list[Message]:
    """Removes reasoning, and whole developer messages, that stand before `border`, the last question of them all."""
    kept: list[Message] = []
    for i, message in enumerate(messages):
        if i < border and message.get("role") == "developer":
            continue
        if i < border and message.get("role") == "assistant":
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
        kept.append(message)
    return kept
