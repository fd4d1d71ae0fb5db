"""The program's front: the table of commands, the global options, and the one `try` that turns errors into sentences.

Exit codes: 0 done, 1 failed, 2 wrong use, 3 not enough memory or disk, 4 a file incomplete or corrupt, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from dsv4_quant.errors import QuantError
from dsv4cli import __version__, console
from dsv4cli.commands import light
from dsv4cli.errors import Dsv4Error, Interrupted

HELP = """Run DeepSeek-V4 on your own machine.

MODEL is a name (dsv4 list shows them), a checkpoint folder, a .gguf file, or owner/repo."""

COMMANDS = {  # where it is, and the first paragraph of its help: neither is imported to print the program's own help
    "chat": ("dsv4cli.commands.chat:chat", "Talk with a model. /help in the chat lists its commands."),
    "run": ("dsv4cli.commands.run:run", "Answer one question and leave."),
    "list": ("dsv4cli.commands.list:list_models", "List the models on this machine (short: ls)."),
    "show": ("dsv4cli.commands.show:show", "Show a model: architecture, tensors by role, context, license."),
    "plan": ("dsv4cli.commands.plan:plan", "Show what a model will need, by tier and purpose, and whether that fits."),
    "quantize": ("dsv4cli.commands.quantize:quantize", "Make a smaller GGUF of a model, for dsv4 and llama.cpp."),
    "pull": ("dsv4cli.commands.pull:pull", "Fetch a model from the Hugging Face hub."),
    "verify": ("dsv4cli.commands.verify:verify", "Hash the files of a model again, and compare with what was published."),
    "rm": ("dsv4cli.commands.rm:rm", "Remove models, finished or half fetched, and say how much that frees."),
    "doctor": ("dsv4cli.commands.doctor:doctor", "Describe this machine and this installation, for yourself or for a report."),
    "bench": ("dsv4cli.commands.bench:bench", "Measure how fast a model reads a prompt and decodes."),
    "imatrix": ("dsv4cli.commands.imatrix:imatrix", "Collect how much each column of a model's matrices is used, which tells "
                                                    "a quantiser where errors matter."),
    "eval": ("dsv4cli.commands.evaluate:app", "Compute logits, perplexity and divergence, to compare models and runners."),
}

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, cls=light.Group,
                  context_settings={"help_option_names": ["-h", "--help"]})
for name, (where, summary) in COMMANDS.items():
    light.add(app, name, where, summary)
light.add(app, "ls", *COMMANDS["list"], hidden=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsv4 {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[bool, typer.Option(
        "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option(
        "--debug", metavar="", help="Show the traceback of an error. May stand after the command too.")] = False,
) -> None:
    """The help above belongs to the program; --debug is taken out by `main` wherever it stands."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code."""
    gc.set_threshold(50_000, 20, 20)  # torch's import and a vocabulary are no garbage: looking through them took 0.3 s
    given, debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = app(given, prog_name="dsv4", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            traceback.print_exc()
        code = explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: BaseException) -> int:
    """Says on stderr what went wrong and what to do, and returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, (KeyboardInterrupt, typer.Abort, Interrupted)):
        return 130  # whoever pressed Ctrl-C knows
    if isinstance(error, (Dsv4Error, QuantError)):
        console.report(error.message, error.hint)
        return error.exit_code
    if isinstance(error, typer.TyperException):  # an option, argument or command that is not there
        if error.format_message():  # without arguments the help was printed, and that is all
            console.report(*_misused(error))
        return 2
    if isinstance(error, BrokenPipeError):  # the reader left (`| head`): nothing to say, now or when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if (short := _shortage(error)) is not None:
        console.report(f"There is not enough memory{short}.", "Choose a smaller --ctx or a smaller model.")
        return 3
    if isinstance(error, OSError):
        console.report(f"{error}.", "Check the path, its permissions and the room on its disk.")
        return 3 if error.errno == errno.ENOSPC else 1
    console.report(f"Something unexpected happened: {type(error).__name__}: {error}",
                   "Run it again with --debug and report what it prints.")
    return 1


def _shortage(error: BaseException) -> str | None:
    """What follows "not enough memory", None for other errors. torch's are told by name and text: it is not imported here."""
    text = str(error)
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in text:
        return f": {wanted[1]} more were wanted" if wanted else ""
    return None


def _misused(error: typer.TyperException) -> tuple[str, str]:
    """Typer's complaint as a sentence, and the nearest names it found as the hint."""
    sentence, _, guess = error.format_message().partition(" Did you mean ")
    options = getattr(error, "possibilities", None)
    if options:
        sentence, guess = error.message, " or ".join(sorted(options))
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "dsv4"
    return f"{sentence.rstrip('.')}.", f"Did you mean {guess.rstrip('.?')}?" if guess else f"See {command} --help."


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, which counts wherever it stands before a "--"."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end or bool(os.environ.get("DSV4_DEBUG"))
