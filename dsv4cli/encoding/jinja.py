"""The chat format as a Jinja template, for a GGUF's `tokenizer.chat_template`: how other runners learn to talk with the model.

`chat.jinja` says what `template.render` says, within what Jinja can: call arguments have to be objects, and whatever somebody
types as a control token becomes one, since runners scan the text that a template returns. dsv4 itself never uses it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4cli.encoding import texts
from dsv4cli.encoding.template import ALIASES
from dsv4cli.errors import UsageError

SOURCE = Path(__file__).with_name("chat.jinja")
CONSTANTS = ("BOS", "EOS", "USER", "ASSISTANT", "REMINDER", "THINK", "END_THINK", "DSML", "TOOLS_BEFORE", "TOOLS_AFTER",
             "RESPONSE_FORMAT")


@cache
def chat_template(release: str) -> str:
    """The template of a release: "april" or "0731", which differ in their levels of effort. Raises UsageError for others."""
    if release not in texts.EFFORT_TEXTS:
        raise UsageError(f"There is no release {release!r}.", f"Choose one of {', '.join(texts.EFFORT_TEXTS)}.")
    found = SOURCE.read_text(encoding="utf-8")
    for name in CONSTANTS:
        found = found.replace(f"@@{name}@@", literal(getattr(texts, name)))
    return found.replace("@@EFFORTS@@", _efforts(release))


def _efforts(release: str) -> str:
    """A Jinja dictionary of every level's text; an API's words for a level are levels as well."""
    levels = {level or "": text for level, text in texts.EFFORT_TEXTS[release].items()}
    levels |= {alias: levels[level] for alias, level in ALIASES[release].items()}
    return "{" + ", ".join(f"{literal(level)}: {literal(text)}" for level, text in levels.items()) + "}"


def literal(text: str) -> str:
    """The text as a Jinja string, with no escapes but those that every implementation of Jinja knows."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
