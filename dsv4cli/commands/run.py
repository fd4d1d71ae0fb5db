"""`dsv4 run`: one question, one answer, for the shell. The answer goes to stdout, everything else to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv4cli import console
from dsv4cli.commands.options import TALKING, with_settings
from dsv4cli.errors import Interrupted, UsageError
from dsv4cli.registry import catalog
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.chat.turn import Reply
    from dsv4cli.engine.records import Token

FIELDS = ("id", "text", "kind", "index", "prompt_tokens", "cached_tokens", "prompt_seconds", "decode_seconds",
          "prompt_tok_s", "decode_tok_s", "memory_bytes", "tool_calls", "finish")


@with_settings(*TALKING)
def run(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="[MODEL] [PROMPT]", show_default=False,
        help="A single argument is the prompt, unless it names a model.")] = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON record per token.")] = False,
    *,
    chosen: Settings,
) -> None:
    """Answer one question and leave.

    Text from a pipe is joined to the prompt and comes first: git diff | dsv4 run "Review this."
    """
    model, prompt = asked(words or [], console.stdin_text(), chosen["model"])
    from dsv4cli.chat import plain, turn
    from dsv4cli.commands import opening

    engine = opening.open_engine(model, chosen)
    console.show_panel(lambda: opening.facts(engine), chosen["quiet"])
    messages = [{"role": "user", "content": prompt}]
    if chosen["system"]:
        messages.insert(0, {"role": "system", "content": chosen["system"]})
    view = _Records() if json else plain.PlainTurn(chosen["quiet"])
    try:
        reply = turn.answer(engine, messages, chosen, view)
    finally:
        view.close()
    _close(reply, chosen)


def asked(words: list[str], piped: str, default_model: str) -> tuple[str, str]:
    """(model, prompt) of the command line's words and the pipe's text. Raises UsageError without a prompt.

    Two words or more: the model, then the prompt. A single word is the model if it names one, the prompt otherwise.
    """
    words = [console.demand_text(word, f"argument {number}") for number, word in enumerate(words, 1)]
    model = default_model
    if len(words) > 1 or (words and catalog.names_model(words[0])):
        model = words.pop(0)
        catalog.resolve(model)  # a misspelt model is said before anything is opened
    prompt = "\n\n".join(part for part in (piped.strip("\n"), " ".join(words)) if part.strip())
    if not prompt:
        raise UsageError("There is no prompt.", f'For example: dsv4 run {model} "What is the capital of France?"')
    return model, prompt


def record(token: Token) -> dict[str, Any]:
    """The JSON form of a token's record: these names stay."""
    return {name: getattr(token, name) for name in FIELDS}


class _Records:
    """The view of --json: every record as a line."""

    def read(self, done: int, whole: int) -> None: ...

    def show(self, token: Token) -> None:
        console.print_json_line(record(token))

    def close(self) -> None: ...


def _close(reply: Reply, chosen: Settings) -> None:
    from dsv4cli.chat import turn

    if reply.cancelled:
        raise Interrupted("Interrupted.")
    if reply.last and reply.last.finish == "length" and not chosen["quiet"]:
        console.note("(cut off: the answer reached --max-tokens or the end of the context)")
    if reply.last and chosen["stats"]:
        console.note(turn.rates(reply.last))
