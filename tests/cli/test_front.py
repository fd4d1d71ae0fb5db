"""The front of the program: help without torch, and every error as a sentence, a hint and an exit code."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer

from dsv4_quant.errors import CorruptFile, UnsupportedModel
from dsv4cli import __version__, cli
from dsv4cli.commands import light, opening
from dsv4cli.errors import CapacityError, CorruptError, Dsv4Error, Interrupted, UsageError
from tests.support.program import Outcome, environment

Run = Callable[..., Outcome]

HEAVY = ("torch", "numpy", "triton", "huggingface_hub", "tokenizers", "safetensors", "gguf", "prompt_toolkit", "transformers",
         "click", "pydantic", "markdown_it", "pygments", "importlib.metadata")
PROBE = """
import sys
from dsv4cli import cli
try:
    cli.main({arguments})
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
OURS = """
import sys
from dsv4cli import cli
try:
    cli.main({arguments})
finally:
    print(*sorted(name for name in sys.modules if name.startswith("dsv4cli.")), file=sys.stderr)
"""
AFTER_HELP = """
from dsv4cli import cli
try:
    cli.main(["--help"])
finally:
    import rich.markdown, rich.traceback, typer.rich_utils
    assert typer.rich_utils.Markdown is not rich.markdown.Markdown
    assert isinstance(typer.rich_utils.Markdown("*text*"), rich.markdown.Markdown)
    assert isinstance(typer.rich_utils.Traceback.from_exception(ValueError, ValueError(), None), rich.traceback.Traceback)
"""
EARLY = """
import time
from dsv4cli import cli
time.sleep(0.3)
cli.main(["show", "flash"])
"""


def python(code: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `code` in another interpreter, its output through the shell's `then`."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {then}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=environment())


@pytest.mark.parametrize("arguments", [
    ["--help"], ["--version"], ["list"], ["show", "flash"], ["show", "tiny"], ["chat", "flash"], ["run", "--help"],
    ["eval", "ppl", "--help"], ["nonsense"], ["chat", "nonsense"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    done = python(PROBE.format(arguments=arguments, heavy=HEAVY))
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(("arguments", "rooms"), [
    (["--help"], {"commands"}),
    (["list"], {"commands", "paths", "registry"}),
    (["show", "tiny"], {"commands", "paths", "registry"}),
])
def test_only_the_command_that_runs_is_imported(arguments: list[str], rooms: set[str]) -> None:
    loaded = [name.split(".") for name in python(OURS.format(arguments=arguments)).stderr.splitlines()[-1].split()]
    assert {room for _, room, *_ in loaded} - {"cli", "console", "errors"} == rooms
    commands = {parts[2] for parts in loaded if parts[1] == "commands" and len(parts) > 2}
    assert commands - {"light", "arguments"} == set(arguments[:1]) & set(cli.COMMANDS)


def test_the_table_of_commands_agrees_with_the_commands() -> None:
    for name, (where, summary) in cli.COMMANDS.items():
        text = light.load(where, name).help.partition("\n\n")[0]
        assert " ".join(text.split()) == summary, name


def test_help_leaves_rich_whole() -> None:
    """What the help does not import is there for whoever wants it."""
    done = python(AFTER_HELP)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_that_are_not_text_are_still_converted() -> None:
    """Only what stays text or a flag bypasses Typer's conversion."""
    app = typer.Typer(add_completion=False)

    @app.command(cls=light.Command)
    def command(count: int, names: list[str], path: Annotated[Path, typer.Option()] = Path("x"), loud: bool = False,
                also: Annotated[list[str] | None, typer.Option()] = None) -> object:
        return count, names, path, loud, also

    made = typer.main.get_command(app)
    assert made(["3", "a", "b", "--path", "y"], standalone_mode=False) == (3, ["a", "b"], Path("y"), False, None)
    assert made(["3", "a", "--also", "b", "--loud"], standalone_mode=False) == (3, ["a"], Path("x"), True, ["b"])
    with pytest.raises(typer.BadParameter):
        made(["three", "a"], standalone_mode=False)


@pytest.mark.parametrize(("typed", "offered"), [
    ("dsv4 ", list(cli.COMMANDS)), ("dsv4 run --think", ["--think", "--think-budget"]),
    ("dsv4 eval p", ["ppl"]), ("dsv4 eval ppl --j", ["--json"]), ("dsv4 ls --j", ["--json"])])
def test_the_shell_completes_commands_and_options(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch, typed: str,
                                                  offered: list[str]) -> None:
    monkeypatch.setenv("_DSV4_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    shown = run_dsv4()
    assert (shown.code, shown.out.split()) == (0, offered)


def test_python_dash_m_is_the_same_program() -> None:
    command = [sys.executable, "-m", "dsv4cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == f"dsv4 {__version__}\n"


def test_help_lists_what_works_and_nothing_else(run_dsv4: Run) -> None:
    shown = run_dsv4("--help")
    assert shown.code == 0
    listed = shown.out.partition("Commands")[2].splitlines()
    commands = [line.split()[1] for line in listed if line.startswith("│ ") and line[2] != " "]
    assert commands == list(cli.COMMANDS)


@pytest.mark.parametrize(("arguments", "sentence", "hint"), [
    (["lst"], "No such command 'lst'.", "Did you mean 'list', 'ls'?"),
    (["frobnicate"], "No such command 'frobnicate'.", "See dsv4 --help."),
    (["run", "--tmp", "3", "x"], "No such option: --tmp.", "--temp"),
    (["run", "--temp"], "Option '--temp' requires an argument.", ""),
    (["run", "--temp", "warm", "x"], "--temp is 'warm', but it must be a number from 0 to 100.", ""),
    (["run", "--temp", "-1", "x"], "--temp is '-1', but it must be a number from 0 to 100.", ""),
    (["run", "--think", "hard", "x"], "--think is 'hard', but it must be off, low, high or max.", ""),
    (["run", "--think", "off", "--effort", "high", "x"], "--think off and --effort high contradict each other.", ""),
    (["run", "--numerics", "exact", "x"], "--numerics is 'exact', but it must be plain or official.", ""),
    (["show"], "Missing argument 'MODEL'.", "See dsv4 show --help."),
    (["chat", "flsh"], "There is no model called flsh.", "flash"),
    (["chat", "./none"], "There is no folder or file ./none.", ""),
    (["run"], "There is no prompt.", 'dsv4 run tiny "'),
    (["run", "flsh", "hello"], "There is no model called flsh.", "Did you mean flash"),
    (["chat", "--session", "../x"], "'../x' cannot be the name of a conversation.", ""),
    (["eval", "logits", "tiny", "--ids", "/none", "--out", "x.npy"], "/none cannot be read: No such file or directory.", ""),
])
def test_wrong_use_is_one_sentence_and_exit_code_2(run_dsv4: Run, arguments: list[str], sentence: str, hint: str) -> None:
    shown = run_dsv4(*arguments)
    assert shown.code == 2
    assert shown.out == ""
    assert sentence in shown.err
    assert hint in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 2


def test_a_model_that_is_not_here_is_exit_code_1(run_dsv4: Run) -> None:
    shown = run_dsv4("chat", "flash")
    assert shown.code == 1
    assert "flash (deepseek-ai/DeepSeek-V4-Flash) is not on this machine" in shown.err
    assert "path" in shown.err.splitlines()[1]


@pytest.mark.parametrize(("error", "code"), [
    (Dsv4Error("Failed."), 1), (UsageError("Wrong."), 2), (CapacityError("8 GB of 4 GB."), 3), (CorruptError("Cut off."), 4),
    (Interrupted("Interrupted."), 130), (CorruptFile("Cut off."), 4), (UnsupportedModel("V4.1 is not yet supported."), 1),
    (MemoryError(), 3), (OSError(28, "No space left on device"), 3), (PermissionError(13, "Permission denied", "x"), 1),
    (KeyboardInterrupt(), 130), (typer.Abort(), 130), (ValueError("a bug"), 1)])
def test_every_kind_of_error_has_its_exit_code(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException,
                                               code: int) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(opening, "open_engine", fail)
    shown = run_dsv4("run", "hello")
    assert shown.code == code
    assert shown.out == ""
    assert shown.err.startswith("error: ") if code != 130 else shown.err == ""
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(("error", "sentence"), [
    (MemoryError(), "There is not enough memory."),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 24 GiB of which"),
     "There is not enough memory: 20.00 MiB more were wanted."),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 4096 bytes. Error code 12 (Cannot allocate memory)"),
     "There is not enough memory: 4096 bytes more were wanted."),
])
def test_whoever_runs_out_of_memory_is_told_so(capsys: pytest.CaptureFixture[str], error: BaseException, sentence: str) -> None:
    assert cli.explain(error) == 3
    assert capsys.readouterr().err.splitlines()[0] == f"error: {sentence}"


@pytest.mark.parametrize("arguments", [["--debug", "run", "hello"], ["run", "--debug", "hello"], ["run", "hello", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(run_dsv4: Run, monkeypatch: pytest.MonkeyPatch,
                                                      arguments: list[str]) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(opening, "open_engine", fail)
    shown = run_dsv4(*arguments)
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert shown.err.count("a bug") >= 2
    assert cli._without_debug(["run", "--", "--debug"]) == (["run", "--", "--debug"], False)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`dsv4 show flash | true`: the pipe is closed before the program writes."""
    assert python(EARLY, then="| true").stderr == ""


def test_help_is_plain_without_a_terminal(run_dsv4: Run) -> None:
    assert "\x1b" not in run_dsv4("run", "--help").out


def test_without_a_command_the_help_is_shown_and_nothing_complained_about(run_dsv4: Run) -> None:
    shown = run_dsv4()
    assert (shown.code, shown.err) == (2, "")
    assert "Usage: dsv4" in shown.out
