"""A model under a limit of memory that is smaller than its weights: the same logits, how fast, and from how much reading.

    python benchmarks/larger_than_ram.py MODEL [--limit 6GB] [--tokens 64] [--prompt 32] [--threads 2] [--out FILE.csv]

Each run is a process of its own, whose pages of the file were evicted before it begins: without a limit, within a control
group of `--limit`, the same without asking for experts ahead, and two at once in one such group. Tokens are random, so
experts are chosen evenly, which no cache likes. Exit code 1 if logits differ in a bit, or the system killed a process for
want of memory; 3 where no control group can be made (it takes root, or a group that was handed to the user). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from limited import limited
from rows import append

from dsv4_quant.files.headers import read_header
from dsv4cli.commands.arguments import size_of

SETTINGS = ("no limit", "limit", "limit, not asked for", "limit, two at once")
PROGRAM = """
import hashlib, json, sys, time
import torch
from dsv4_kernels import backends
from dsv4_quant.files import open_source
from dsv4cli.engine import opening
from dsv4cli.engine.engine import use_threads
from dsv4cli.model.transformer import Model

path, prompt, tokens, threads, asks = sys.argv[1], *map(int, sys.argv[2:])
source = open_source(path)
ids = torch.randint(0, source.config.vocab_size, (prompt + tokens,), generator=torch.Generator().manual_seed(1))
plan = opening.place_of(source, path, len(ids), "official", "cpu").plan
use_threads(threads, plan)
opening.read_ahead(source, plan)
if not asks:
    backends.ask_ahead(0)
model = Model.bind(source)
state, digest, seconds = model.new_state(len(ids)), hashlib.sha256(), []
for piece in (ids[:prompt], *ids[prompt:].split(1)):
    began = time.perf_counter()
    logits = model.forward(piece, state)
    seconds.append(time.perf_counter() - began)
    digest.update(logits.numpy().tobytes())
counters = dict(line.split(": ") for line in open("/proc/self/io"))
print(json.dumps({"seconds": seconds, "digest": digest.hexdigest(), "read": int(counters["read_bytes"]), "disk": plan.on_disk}))
"""


@dataclass(frozen=True)
class Row:
    """Rates in tokens per second, of the second half beside the first to see whether they last; sizes in 10^9 bytes."""

    file: str
    setting: str
    limit_gb: float | None
    planned_on_disk_gb: float
    peak_gb: float | None
    read_gb: float
    prompt_tok_s: float
    first_half_tok_s: float
    second_half_tok_s: float
    slowest_s: float
    digest: str
    killed: int
    date: str = date.today().isoformat()


def measure(setting: str, options: argparse.Namespace) -> list[Row]:
    """A row for each process of this setting."""
    limit = None if setting == "no limit" else options.limit
    for file in read_header(options.model).files():
        evict(file)
    command = [sys.executable, "-c", PROGRAM, str(options.model), str(options.prompt), str(options.tokens),
               str(options.threads), str(int("not" not in setting))]
    with nullcontext() if limit is None else limited(limit) as group:
        done = together([command] * (2 if "two" in setting else 1), group.join if group else None)
        peak, killed = (group.peak / 1e9, group.killed) if group else (None, 0)
    rows = []
    for told in done:
        first, rest = told["seconds"][0], told["seconds"][1:]
        half = len(rest) // 2
        rows.append(Row(Path(options.model).name, setting, limit and limit / 1e9, told["disk"] / 1e9, peak, told["read"] / 1e9,
                        options.prompt / first, 1 / statistics.mean(rest[:half]), 1 / statistics.mean(rest[half:]), max(rest),
                        told["digest"], killed))
    return rows


def evict(file: Path) -> None:
    """Leaves none of a file in the page cache."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def together(commands: Sequence[Sequence[str]], join: Callable[[], None] | None) -> list[dict]:
    """What each of these programs tells, which run at the same time."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=join) for command in commands]
    told = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit(f"a run ended with {[process.returncode for process in running]}; -9 is the system's, for want of memory")
    return [json.loads(text) for text in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=lambda text: size_of(text, "--limit"), default=6 * 10**9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", type=lambda text: text.split(";"), default=SETTINGS, help="some of them, with ; between")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print("| setting | on disk by plan, GB | peak GB | read GB | prompt tok/s | first half | second half | slowest s | logits |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for setting in options.settings:
        try:
            rows += (new := measure(setting, options))
        except OSError as error:
            print(f"No control group: {error}.", file=sys.stderr)
            sys.exit(3)
        for row in new:
            peak = f"{row.peak_gb:.2f}" if row.peak_gb else "-"
            print(f"| {row.setting} | {row.planned_on_disk_gb:.2f} | {peak} | {row.read_gb:.2f} | {row.prompt_tok_s:.2f} | "
                  f"{row.first_half_tok_s:.2f} | {row.second_half_tok_s:.2f} | {row.slowest_s:.2f} | {row.digest[:8]} |")
    if options.out:
        append(options.out, [field.name for field in fields(Row)], map(asdict, rows))
    sys.exit(int(len({row.digest for row in rows}) > 1 or any(row.killed for row in rows)))


if __name__ == "__main__":
    main()
