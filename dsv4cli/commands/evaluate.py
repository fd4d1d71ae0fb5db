"""`dsv4 eval`: numbers about a model, to compare it with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from dsv4cli import console
from dsv4cli.commands import light
from dsv4cli.commands.arguments import Json, Model, demand_folder_of
from dsv4cli.commands.options import OPENING, with_settings
from dsv4cli.errors import UsageError
from dsv4cli.settings import Settings

if TYPE_CHECKING:
    from dsv4cli.engine.divergence import Divergence

app = typer.Typer(help="Compute logits, perplexity and divergence, to compare models and runners.", no_args_is_help=True,
                  add_completion=False, cls=light.Group)
STDIN = "-"
HEADINGS = ("context", "tokens", "perplexity", "reference", "KL mean", "KL 99 %", "top-1 equal")


@app.command("logits", cls=light.Command)
@with_settings(*OPENING, "quiet")
def logits(
    model: Model,
    ids: Annotated[str, typer.Option(metavar="FILE", help="Token ids separated by blanks; - is stdin.")],
    out: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where to write float32 logits [tokens, vocab].")],
    *,
    chosen: Settings,
) -> None:
    """Write the logits after each of the given token ids."""
    tokens = ids_of(text_of(ids), ids)
    demand_folder_of(out, "--out")
    from dsv4cli.commands.opening import open_engine
    from dsv4cli.engine import evaluate

    engine = open_engine(model, chosen)
    with console.progress(chosen["quiet"]) as report:
        evaluate.write_logits(engine, tokens, out, progress=report)
    if not chosen["quiet"]:
        console.note(f"{out}: float32 [{len(tokens)}, {engine.config.vocab_size}]")


@app.command("ppl", cls=light.Command)
@with_settings(*OPENING, "quiet")
def ppl(
    model: Model,
    text: Annotated[str, typer.Option(metavar="FILE", help="Text in UTF-8; - is stdin.")],
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Measure the perplexity over a text, in windows of --ctx tokens (2048 unless given)."""
    words = text_of(text)
    from dsv4cli.commands.opening import open_engine
    from dsv4cli.engine import evaluate

    engine = open_engine(model, chosen)
    tokens = engine.tokenizer.encode_text(words)
    window = chosen["ctx"] or min(2048, engine.ctx)
    with console.progress(chosen["quiet"]) as report:
        found = evaluate.perplexity(engine, tokens, window=window, progress=report)
    if json:
        console.print_json({"model": engine.name, "perplexity": found.value, "nll": found.nll, "error": found.error,
                            "tokens": found.tokens, "window": window})
    else:
        print(f"perplexity {found.value:.4f} (nll {found.nll:.4f} ± {found.error:.4f} nats over {found.tokens} tokens, "
              f"window {window})")


@app.command("kld", cls=light.Command)
@with_settings(*OPENING, "quiet")
def kld(
    model: Model,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The model to compare with: what MODEL was made from.")],
    text: Annotated[Optional[str], typer.Option(  # noqa: UP045 - Typer reads it at run time
        metavar="FILE", help="Text in UTF-8; - is stdin. Without it, a text that comes with dsv4.")] = None,
    json: Json = False,
    *,
    chosen: Settings,
) -> None:
    """Measure how far a model's predictions are from a reference's.

    Perplexity of both, Kullback-Leibler divergence of the model from the reference in nats, and how often both expect the same
    token, in contexts of 512 and of --ctx tokens (2048 unless given).
    """
    words = text_of(text) if text is not None else None
    from dsv4cli.commands.opening import open_engine
    from dsv4cli.engine import quality

    ours, theirs = open_engine(model, chosen), open_engine(reference, chosen)
    with console.progress(chosen["quiet"]) as report:
        rows = quality.compared(ours, theirs, text=words, ctx=chosen["ctx"], progress=report)
    if json:
        console.print_json({"model": ours.name, "reference": theirs.name, "text": text or "dsv4",
                            "contexts": [asdict(row) for row in rows]})
    else:
        print_divergence(rows)


def print_divergence(rows: Sequence[Divergence]) -> None:
    """A line for each context length."""
    console.table(HEADINGS, [_in_words(row) for row in rows], right=range(len(HEADINGS)))


def _in_words(row: Divergence) -> list[str]:
    return [f"{row.window:,}", f"{row.tokens:,}", f"{row.perplexity:.4f}", f"{row.reference_perplexity:.4f}",
            f"{row.kl:.5f} ± {row.kl_error:.5f}", f"{row.kl_p99:.4f}", f"{row.top1:.2%}"]


def ids_of(text: str, where: str) -> list[int]:
    """Ids separated by blanks. Raises UsageError naming the word that is none."""
    found = []
    for number, word in enumerate(text.split(), 1):
        if not (word.isascii() and word.isdigit()):
            raise UsageError(f"{where} holds {word[:40]!r} as its word {number}, which is not a token id.",
                             "Write whole numbers separated by blanks.")
        found.append(int(word))
    if not found:
        raise UsageError(f"{where} holds no token ids.", "Write whole numbers separated by blanks.")
    return found


def text_of(name: str) -> str:
    """The text of a file or, for "-", of stdin. Raises UsageError if it cannot be read or is not UTF-8."""
    if name == STDIN:
        return console.stdin_text()
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise UsageError(f"{name} is not valid UTF-8: {byte}.", "Convert it, as with iconv -t UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}.", "Check its path.") from None
