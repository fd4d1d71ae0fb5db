"""The Triton kernels and whole models on the card at hand, beside what the card itself reaches and what is wanted.

    python -m benchmarks.gpu --out benchmarks/results/gpu.csv     everything; run it from the repository's folder
    python -m benchmarks.gpu --only moe                           kernels of one operation (or `tiny`, `model`, `rival`)
    python -m benchmarks.gpu --gguf FILE                          dsv4 and llama.cpp on that file as well
    TRITON_INTERPRET=1 python -m benchmarks.gpu --small           a test of this program, in Triton's interpreter

A kernel's bound is what it has to read and write at the card's read bandwidth, or what it has to multiply at the rate of its bf16
products, whichever takes longer; both are measured first. Each is compared with `ref` on the same card (relative error; of
chosen entries, the share that differs). `tiny` answers as on the CPU. The model is Flash with random weights in the recipe
q2, made in the card's memory, or its first layers as many as fit; beside its rates stand those that are wanted on an H200.

Rows are written as they come, and what fails is a row that says why. Everything runs in a process of its own: where that dies, or
takes too long for one part, another goes on behind it. The exit code is 1 if something failed or is far from the reference.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.gpu_calls import FLASH, MAKERS, SMALL, Call, Maker, Sizes
from benchmarks.gpu_whole import QUESTIONS, Row, Whole, rival, texts
from benchmarks.rows import append
from dsv4_kernels import backends, tuned
from tools.tune import NEAR, by_clock, on_card

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("what", "format", "tokens", "context", "ms", "gb_s", "tflop_s", "tok_s", "target", "of_bound", "error", "layers",
          "trouble", "card", "architecture", "torch", "triton", "commit", "date")
SHOWN = FIELDS[:13]
OPERATIONS = (*MAKERS, "tiny", "model", "rival")
PATIENCE = 420  # seconds for one part, compiling included; the longest is a prompt of 131,072 tokens
DEAD, DONE = 3, (0, 1)  # exit codes: the card is lost to this process; it came to its end
SMALL_FORMATS = ("", "q8_0", "bf16")
Timed = Callable[[Callable[[], Tensor]], float]


class Ceilings(NamedTuple):
    """Of the card: bytes per second copied (both ways counted) and read, and bf16 operations per second."""

    copy: float
    read: float
    products: float

    def bound(self, nbytes: float, operations: float = 0) -> float:
        """Seconds."""
        return max(nbytes / self.read, operations / self.products)

    def rows(self) -> Iterator[Row]:
        yield {"what": "card.copy", "gb_s": self.copy / 1e9}
        yield {"what": "card.read", "gb_s": self.read / 1e9}
        yield {"what": "card.bf16", "tflop_s": self.products / 1e12}


class Part(NamedTuple):
    """What is measured together, and fails together."""

    op: str
    name: str
    rows: Callable[[], Iterator[Row]]


def ceilings(device: torch.device, timed: Timed) -> Ceilings:
    large = device.type == "cuda"
    source = torch.ones(1 << (28 if large else 12), device=device)
    to, side = torch.empty_like(source), 8192 if large else 64
    a = torch.randn(side, side, device=device).bfloat16()
    return Ceilings(2 * source.nbytes / (1e-3 * timed(lambda: to.copy_(source))), source.nbytes / (1e-3 * timed(source.sum)),
                    2 * side**3 / (1e-3 * timed(lambda: a @ a)))


def measured(call: Call, roof: Ceilings, timed: Timed) -> Row:
    error = difference(call.computed("gpu"), call.computed("ref"))
    seconds = 1e-3 * timed(call.run)
    return {"what": f"{call.op}.{call.door}", "format": call.format, "tokens": call.tokens, "context": call.context,
            "ms": 1e3 * seconds, "gb_s": call.nbytes / seconds / 1e9, "tflop_s": call.operations / seconds / 1e12,
            "of_bound": roof.bound(call.nbytes, call.operations) / seconds, "error": error}


def difference(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point():
        return 1 - float(torch.isin(found, expected).float().mean())
    return float((found - expected).norm() / expected.norm())


def parts_of(options: argparse.Namespace, device: torch.device) -> list[Part]:
    """Everything that was asked for, the card's own rates first."""
    s, timed = (SMALL, by_clock) if options.small else (FLASH, on_card)
    roof = cache(lambda: ceilings(device, timed))
    inside = backends.interpreted if options.small else nullcontext

    def of_kernels(op: str, maker: Maker, tokens: int, name: str) -> Iterator[Row]:
        with inside(), torch.inference_mode():
            for call in maker(s, tokens, Generator(device).manual_seed(1), name):
                yield measured(call, roof(), timed)

    found = [Part("card", "card", lambda: roof().rows())]
    if not options.small:
        found.append(Part("tiny", "tiny.text", lambda: texts("cuda", inside, QUESTIONS, 60)))
    elif options.only == "tiny":  # minutes
        found.append(Part("tiny", "tiny.text", lambda: texts("cpu", inside, QUESTIONS[:1], 2)))
    found += [Part(op, f"{op}.{maker.__name__.strip('_')} {name} {tokens}", partial(of_kernels, op, maker, tokens, name))
              for op, makers in MAKERS.items() for maker, formats in makers for tokens in s.tokens for name in formats
              if not options.small or name in SMALL_FORMATS]
    found += _of_the_model(s, device, options.eager, roof, inside)
    found.append(Part("rival", "rival", lambda: rival(options.gguf, s, device.type)))
    return [part for part in found if part.op == "card" or options.only in ("", part.op)]


def _of_the_model(s: Sizes, device: torch.device, eager: bool, roof: Callable[[], Ceilings],
                  inside: Callable[[], AbstractContextManager[None]]) -> list[Part]:
    model = Whole(s, device, eager)

    def within(rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        with inside():
            yield from rows()

    found = [("model.prompt", model.prompt),
             *((f"model.decode {context}", partial(model.decode, context, lambda nbytes: roof().bound(nbytes)))
               for context in s.contexts),
             ("model.chunked", model.chunked)]
    if device.type == "cuda":
        found.append(("token.launches", model.launches))
    return [Part("model", name, partial(within, rows)) for name, rows in found]


def run(parts: Sequence[Part], after: int, place: Path | None, tell: Callable[[Row], None]) -> bool:
    """Tells the rows of all parts from number `after` on, and before each writes its number to `place`; what fails is a row with
    `trouble`. False as soon as the card no longer answers."""
    for number, part in enumerate(parts[after:], after):
        if place is not None:
            place.write_text(str(number))
        try:
            with impatient() if place is not None else nullcontext():
                for row in part.rows():
                    tell(row)
        except Exception as failure:  # whatever it is, the other parts have their own chances
            tell({"what": part.name, "trouble": said(failure)})
        if lost():
            return False
    return True


@contextmanager
def impatient() -> Iterator[None]:
    """Ends the process where this lasts too long, for nobody can interrupt a wait for the card."""
    watch = Timer(PATIENCE, os._exit, [DEAD])
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def said(failure: Exception) -> str:
    return (str(failure).strip() or type(failure).__name__).splitlines()[0][:300]


def lost() -> bool:
    """Whether a kernel reached outside of its memory, say: then nothing computes in this process any more."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def supervised(arguments: Sequence[str], parts: Sequence[Part], tell: Callable[[Row], None]) -> int:
    """Runs all parts in other processes, one after the other died. `tell` is told only what these could not tell themselves."""
    after, code = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "part"
        while after < len(parts):
            command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--after", str(after), "--place", str(place)]
            found = subprocess.run(command, cwd=ROOT, check=False).returncode
            if found in DONE:
                return max(code, found)
            if not place.exists():
                return found  # it did not even begin
            begun, code = int(place.read_text()), 1
            tell({"what": parts[begun].name, "trouble": "the card was lost, or this took too long" if found == DEAD else
                  f"the process ended with {found}"})
            place.unlink()
            after = begun + 1
    return code


@cache
def machine(device: torch.device) -> Row:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"card": torch.cuda.get_device_name() if device.type == "cuda" else "", "architecture": tuned.architecture(device),
            "torch": version("torch"), "triton": version("triton"), "commit": commit.stdout.strip(),
            "date": date.today().isoformat()}


def unable(options: argparse.Namespace) -> str | None:
    """Why this cannot be done here."""
    if (missing := backends.gpu_trouble()) is not None:
        return f"{missing.message} {missing.hint}"
    from dsv4_kernels.gpu import INTERPRETED

    if options.small and not INTERPRETED:
        return "--small is for Triton's interpreter. Set TRITON_INTERPRET=1."
    if options.small and options.out:
        return "Times of Triton's interpreter are not written. Leave out --out, or --small."
    if not options.small and (INTERPRETED or not torch.cuda.is_available()):
        return "There is no card to measure. Only --small runs without one, with TRITON_INTERPRET=1."
    return None


def show(row: Row) -> None:
    def shown(name: str) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    print(f"| {' | '.join(shown(name) for name in SHOWN)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=("", *OPERATIONS))
    parser.add_argument("--eager", action="store_true", help="describe every decoded token anew, without CUDA graphs")
    parser.add_argument("--gguf", help="a file that dsv4 and llama.cpp are to run as well")
    parser.add_argument("--small", action="store_true", help="everything small, in Triton's interpreter")
    parser.add_argument("--out", help="CSV to append the rows to")
    parser.add_argument("--after", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if (why := unable(options)) is not None:
        print(why, file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.small else "cuda")
    parts, wrong = parts_of(options, device), []

    def tell(row: Row) -> None:
        show(row)
        if options.out:  # at once: what was measured stays if a later one fails
            append(options.out, FIELDS, [row | machine(device)])
        if "error" in row and not row["error"] <= NEAR:  # so is NaN
            wrong.append(f"{row['what']} ({row['format']}, {row['tokens']} tokens) is {row['error']:.3g} from the reference")
        elif row.get("trouble") and not row["what"].startswith("rival"):
            wrong.append(f"{row['what']}: {row['trouble']}")

    if options.after is None:
        print(f"| {' | '.join(SHOWN)} |\n|{'---|' * len(SHOWN)}", flush=True)
    if not options.small and options.after is None:
        return supervised(sys.argv[1:] if arguments is None else arguments, parts, tell)
    if options.place is not None:
        faulthandler.enable()
    alive = run(parts, options.after or 0, options.place, tell)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return DEAD if not alive else 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
