"""Messages to a prompt, byte for byte as DeepSeek-V4 was trained (spec/encoding.md sections 2 to 8 and 12 to 14).

    prompt    := BOS effort? message*
    system    := text                                        no marker of any kind
    user      := <｜User｜> part (blank-line part)*             tool results are parts
    assistant := [reasoning </think>] text [calls] EOS
    header    := <｜Assistant｜> (<think> | </think>)           ends the message before an answer

Nothing is added around markers and all text is kept as it is. In thinking mode the reasoning of turns before the last
question is dropped and their headers read `</think>`, unless tools are declared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv4cli.encoding import history, texts
from dsv4cli.encoding.history import Message
from dsv4cli.encoding.segments import Rendered
from dsv4cli.errors import UsageError

Release = Literal["april", "0731"]
Think = Literal["off", "low", "high", "max"]

# What the API accepts beside a release's own levels.
ALIASES = {
    "april": {"minimal": "high", "low": "high", "medium": "high", "xhigh": "max", "ultra": "max"},
    "0731": {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"},
}
MARKS = (texts.DSML, texts.THINK, texts.END_THINK)


def think_level(think: str, release: str) -> tuple[bool, str | None]:
    """The user's `--think` as (thinking, effort) of this release: `off`, a level of the release or an API alias."""
    if think in ("off", "none"):
        return False, None
    efforts = _efforts(release)
    level = ALIASES[release].get(think, think)
    if level not in efforts:
        raise UsageError(f"Unknown thinking level {think!r}.", "Use off, low, high or max.")
    return True, level


def render(
    messages: Sequence[Message],
    *,
    thinking: bool,
    effort: str | None = None,
    release: str = "april",
    tools: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    context: Sequence[Message] | None = None,
    bos: bool = True,
    nest_dict_arguments: bool = False,
) -> Rendered:
    """Renders `messages` (OpenAI-shaped dictionaries) to a prompt.

    `context` are messages that precede and are already rendered: they decide about ordering and dropping, but only
    `messages` come out, without BOS. `nest_dict_arguments` repeats what the April script does with call arguments given
    as a dictionary instead of JSON text. Raises UsageError for messages of another shape, an unknown release, role,
    effort or task, and an empty developer message.
    """
    table = _efforts(release)
    if effort not in table:
        raise UsageError(
            f"Release {release} has no effort {effort!r}.", f"Use one of {', '.join(filter(None, table))}."
        )
    history.demand_messages([*(context or ()), *messages])
    before = history.merge_users(context or ())
    full = before + history.merge_users(history.declare_tools(messages, tools))
    history.order_results(full)
    keep = not drop_thinking or not thinking or any(message.get("tools") for message in full)
    if not keep:
        border = history.last_question(full)
        before, full = (history.drop_old_reasoning(part, border) for part in (before, full))
    prompt = Rendered()
    if bos and not context:
        prompt.control(texts.BOS)
    if thinking and not before:
        prompt.text(table[effort])
    page = _Page(prompt, full, thinking, keep, nest_dict_arguments)
    for index in range(len(before), len(full)):
        page.message(index)
    return prompt


@dataclass
class _Page:
    """The rendering of one conversation: what is written so far, and what the rest of it has to know."""

    prompt: Rendered
    messages: list[Message]
    thinking: bool
    keep_reasoning: bool
    nest_dict_arguments: bool

    def __post_init__(self) -> None:
        self.border = -1 if self.keep_reasoning else history.last_question(self.messages)

    def message(self, index: int) -> None:
        message = self.messages[index]
        role = message.get("role")
        renderers: dict[str, Callable[[int, Message], None]] = {
            "system": self.system, "user": self.user, "developer": self.developer, "assistant": self.assistant,
            "latest_reminder": self.reminder,
        }  # fmt: skip
        if role not in renderers:
            raise UsageError(
                f"Unknown role {role!r} in message {index + 1}.", f"Use one of {', '.join(renderers)}, tool."
            )
        renderers[role](index, message)
        self.ending(index, message)

    def system(self, index: int, message: Message) -> None:
        self.prompt.text(history.flat_text(message.get("content")))
        self.declarations(message)

    def developer(self, index: int, message: Message) -> None:
        if not message.get("content"):
            raise UsageError(f"The developer message {index + 1} is empty.", "Give it a text or leave it out.")
        self.prompt.control(texts.USER)
        self.system(index, message)

    def declarations(self, message: Message) -> None:
        """Tools and response format, after the text of a system or developer message."""
        if tools := message.get("tools"):
            schemas = "\n".join(_json(tool.get("function", tool)) for tool in tools)
            self.prompt.text("\n\n")
            self.prompt.marked(texts.TOOLS_BEFORE, MARKS)
            self.prompt.text(schemas + texts.TOOLS_AFTER)
        if schema := message.get("response_format"):
            self.prompt.text("\n\n" + texts.RESPONSE_FORMAT + _json(schema))

    def user(self, index: int, message: Message) -> None:
        self.prompt.control(texts.USER)
        pieces = [
            f"<tool_result>{text}</tool_result>" if kind == "result" else text for kind, text, _ in message["parts"]
        ]
        self.prompt.text("\n\n".join(pieces))

    def reminder(self, index: int, message: Message) -> None:
        self.prompt.control(texts.REMINDER)
        self.prompt.text(history.flat_text(message.get("content")))

    def assistant(self, index: int, message: Message) -> None:
        after_task = index > 0 and self.messages[index - 1].get("task")
        if self.thinking and index > self.border and not after_task:
            self.prompt.text(history.flat_text(message.get("reasoning_content")))
            self.prompt.control(texts.END_THINK)
        self.prompt.text(history.flat_text(message.get("content")))
        if calls := message.get("tool_calls"):
            self.calls(calls)
        if not message.get("wo_eos"):
            self.prompt.control(texts.EOS)

    def ending(self, index: int, message: Message) -> None:
        """The generation header or task token, where an answer follows or is asked for."""
        role, task = message.get("role"), message.get("task")
        if task is not None and task not in texts.TASKS:
            raise UsageError(f"Unknown task {task!r} in message {index + 1}.", f"Use one of {', '.join(texts.TASKS)}.")
        following = self.messages[index + 1].get("role") if index + 1 < len(self.messages) else None
        if following not in (None, "assistant", "latest_reminder"):
            return
        if role in history.ASKERS and task in (None, "action"):
            self.prompt.control(texts.ASSISTANT)
            self.prompt.control(texts.THINK if self.thinking and index >= self.border else texts.END_THINK)
        if task is not None and role in (*history.ASKERS, "assistant"):
            self.prompt.control(texts.TASKS[task])

    def calls(self, calls: Sequence[Message]) -> None:
        """The DSML block: marks are control tokens, names and values are not."""
        self.prompt.text("\n\n")
        self.tag("<", "tool_calls>\n")
        for number, call in enumerate(calls):
            self.prompt.text("\n" if number else "")
            function = call.get("function", call)
            self.tag("<", f'invoke name="{function["name"]}">\n')
            for place, (key, value) in enumerate(self.arguments(function.get("arguments")).items()):
                self.prompt.text("\n" if place else "")
                is_text = isinstance(value, str)
                self.tag("<", f'parameter name="{key}" string="{str(is_text).lower()}">')
                self.prompt.text(value if is_text else _json(value))
                self.tag("</", "parameter>")
            self.prompt.text("\n")
            self.tag("</", "invoke>")
        self.prompt.text("\n")
        self.tag("</", "tool_calls>")

    def tag(self, opener: str, rest: str) -> None:
        self.prompt.text(opener)
        self.prompt.control(texts.DSML)
        self.prompt.text(rest)

    def arguments(self, given: object) -> dict[str, Any]:
        """A call's arguments as a dictionary. Text that is no JSON object becomes one string called `arguments`."""
        if given is None:
            return {}
        if isinstance(given, dict):
            return {"arguments": given} if self.nest_dict_arguments else given
        text = given if isinstance(given, str) else _json(given)
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):  # a model may well write thousands of brackets
            parsed = None
        return parsed if isinstance(parsed, dict) else {"arguments": text}


def _efforts(release: str) -> dict[str | None, str]:
    """The levels of a release and their texts."""
    if release not in texts.EFFORT_TEXTS:
        raise UsageError(f"There is no release {release!r}.", f"Choose one of {', '.join(texts.EFFORT_TEXTS)}.")
    return texts.EFFORT_TEXTS[release]


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"A schema or an argument is no JSON: {error}.", "Use what json.dumps can write.") from error
