"""What `dsv4 plan` says beside what a process takes whose context is full.

    python benchmarks/memory.py MODEL[@CTX[@NUMERICS]] ... [--threads 2] [--out FILE.csv]

Each model is opened in a process of its own, as `dsv4 chat` opens it; its context is filled with random tokens, and one is
decoded. `planned` is what the program planned before it loaded anything, `peak` the most resident memory that the system
saw (VmHWM: anonymous, and what is mapped of the weights), `anonymous` the part of it that is no file's, at the end. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from rows import append

PROGRAM = """
import random, sys
from dsv4cli import Engine
model, ctx, numerics, threads = sys.argv[1:]
engine = Engine.open(model, ctx=int(ctx), numerics=numerics, threads=int(threads))
session, numbers = engine.session(), random.Random(1)
session.sync([numbers.randrange(engine.config.vocab_size) for _ in range(engine.ctx - 1)])
session.step(5)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(engine.plan.needed, *(int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")))
"""


@dataclass(frozen=True)
class Row:
    """Memory in 10^6 bytes."""

    file: str
    context: int
    numerics: str
    planned: float
    peak: float
    anonymous: float
    planned_to_peak: float
    date: str = date.today().isoformat()


def measure(setting: str, threads: int) -> Row:
    model, ctx, numerics = [*setting.split("@"), "", ""][:3]
    given = [model, ctx or "2048", numerics or "official", str(threads)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], check=True, capture_output=True, text=True)
    planned, peak, anonymous = (int(number) / 1e6 for number in done.stdout.split())
    return Row(Path(model).name, int(given[1]), given[2], planned, peak, anonymous, planned / peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[@CTX[@NUMERICS]]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print("| model | context | numerics | planned MB | peak MB | anonymous | planned / peak |\n|---|---|---|---|---|---|---|")
    for setting in options.models:
        row = measure(setting, options.threads)
        print(f"| {row.file} | {row.context} | {row.numerics} | {row.planned:.0f} | {row.peak:.0f} | {row.anonymous:.0f} | "
              f"{row.planned_to_peak:.3f} |", flush=True)
        if options.out:
            append(options.out, [field.name for field in fields(Row)], [asdict(row)])


if __name__ == "__main__":
    main()
