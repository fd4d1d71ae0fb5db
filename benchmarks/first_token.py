"""How long `dsv4 run` takes to its first token, and how much anonymous memory it comes to hold.

    python benchmarks/first_token.py MODEL ... [--threads 2] [--gen 64] [--runs 3] [--out FILE.csv]

The command is started as a user would start it, and its records (--json) are read as they arrive: the time counts from
the start of the process, so Python's own start, the imports and the opening of the model are in it. Weights that lie in the
mapped file are no anonymous memory; everything else is, and its peak is looked up in /proc every few milliseconds. A first run
that nobody counts brings the file into the page cache. The model needs a tokenizer. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import median

from rows import append

QUESTION = "What is the capital of France?"
PAUSE = 0.005  # seconds between two looks at the memory


@dataclass(frozen=True)
class Run:
    """What was seen of one run; memory in 10^6 bytes."""

    file: str
    threads: int
    prompt_tokens: int
    tokens: int
    first_token_s: float
    decode_tok_s: float
    anonymous_mb: float
    mapped_mb: float
    date: str


class Memory(threading.Thread):
    """Watches a process: the most anonymous and the most file-backed memory that it held, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self.start()

    def run(self) -> None:
        while held := self._held():
            for name in self.peaks:
                self.peaks[name] = max(self.peaks[name], held[name])
            time.sleep(PAUSE)

    def _held(self) -> dict[str, int]:
        """Empty once the process is gone: one that has ended but is not yet waited for has no memory lines."""
        try:
            lines = [line.partition(":") for line in self.status.read_text().splitlines()]
        except OSError:
            return {}
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in self.peaks}


def one_run(model: str, threads: int, gen: int) -> Run:
    """Asks once. Raises SystemExit with the program's own words when it fails."""
    command = [sys.executable, "-m", "dsv4cli", "run", model, QUESTION, "--json", "--quiet", "--think", "off", "--temp", "0",
               "--max-tokens", str(gen), "--threads", str(threads)]
    began, first, last = time.perf_counter(), 0.0, {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        memory = Memory(process.pid)
        for line in process.stdout:
            first = first or time.perf_counter() - began
            last = json.loads(line)
        said = process.stderr.read()
        memory.join()
    if process.returncode or not last:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return Run(Path(model).stem, threads, last["prompt_tokens"], last["index"] + 1, first, last["decode_tok_s"],
               memory.peaks["RssAnon"] / 1e6, memory.peaks["RssFile"] / 1e6, date.today().isoformat())


def show(model: str, runs: list[Run]) -> None:
    first, anonymous = median(run.first_token_s for run in runs), max(run.anonymous_mb for run in runs)
    print(f"| {Path(model).stem} | {runs[0].threads} | {runs[0].prompt_tokens} | {first:.2f} s | {anonymous:.0f} MB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", help="CSV to append the runs to")
    options = parser.parse_args()
    seen: list[Run] = []
    print("| file | threads | prompt | first token after | most anonymous memory |\n|---|---|---|---|---|")
    for model in options.models:
        one_run(model, options.threads, 1)
        runs = [one_run(model, options.threads, options.gen) for _ in range(options.runs)]
        show(model, runs)
        seen += runs
    if options.out:
        append(options.out, [field.name for field in fields(Run)], map(asdict, seen))


if __name__ == "__main__":
    main()
