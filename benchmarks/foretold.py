"""Rates that `dsv4 plan` foretells beside what `dsv4 bench` measures, in the same minutes.

    python benchmarks/foretold.py MODEL ... [--rounds 2] [--gen 64] [--out FILE.csv]

The machine is measured as `dsv4 doctor --measure` does it (the formats of the model alone), then the model decodes in a
process of its own, then the machine is measured again: where bandwidth wavers from minute to minute, all three see the same.
What is foretold is the mean of the times foretold from both measurements, for as many tokens of context as there are on
average.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from rows import append

from dsv4_quant.files.headers import Header, read_header
from dsv4cli.engine import measuring, rates
from dsv4cli.engine.machine import Profile

NOTHING = Profile(None, None, None, None, None, None, "", date.today().isoformat())


@dataclass(frozen=True)
class Row:
    """Tokens a second; memory in GB/s, before and after."""

    file: str
    round: int
    foretold: float
    measured: float
    error: float  # of what was foretold, 0.1 for 10 % too much
    foretold_before: float
    foretold_after: float
    memory_before: float
    memory_after: float
    commit: str
    date: str = date.today().isoformat()


def foretold(header: Header, depth: int, passes: int) -> tuple[float, float]:
    """Seconds of a token, and the bandwidth of memory, by a measurement made now."""
    work = rates.work_of(header, depth, "official")
    profile = measuring.with_kernels(NOTHING, sorted({*work.dense, *work.chosen}), passes)
    visits = header.config.num_experts_per_tok
    costs = rates.cpu_costs(work, profile, visits)
    assert costs is not None, "there are no kernels for a format of the model"
    return work.layers * costs.layer(0, visits, 0, whole=False) + costs.token, (profile.memory or 0) / 1e9


def compare(model: str, number: int, options: argparse.Namespace) -> Row:
    header = read_header(model)
    before, bandwidth = foretold(header, options.gen // 2, options.passes)
    command = [sys.executable, "-m", "dsv4cli", "bench", model, "--json", "--quiet", "--prompt", "0", "--gen", str(options.gen)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]["decode_tok_s"]
    after, again = foretold(header, options.gen // 2, options.passes)
    told = 2 / (before + after)
    return Row(Path(model).stem, number, told, measured, told / measured - 1, 1 / before, 1 / after, bandwidth, again, commit())


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--passes", type=int, default=measuring.PASSES, help="over all kernels; the median counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print("| file | round | foretold tok/s | measured | error | by the machine before | after | memory GB/s before | after |")
    print("|---" * 9 + "|")
    for number in range(options.rounds):
        for model in options.models:
            row = compare(model, number, options)
            print(f"| {row.file} | {row.round} | {row.foretold:.1f} | {row.measured:.1f} | {row.error:+.0%} | "
                  f"{row.foretold_before:.1f} | {row.foretold_after:.1f} | {row.memory_before:.1f} | {row.memory_after:.1f} |",
                  flush=True)
            if options.out:
                append(options.out, [field.name for field in fields(Row)], [asdict(row)])


if __name__ == "__main__":
    main()
