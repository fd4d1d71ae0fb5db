"""Compile every Triton kernel for every card that we mean, and read from the objects what each asks of the card.

    python -m tools.registers             compile all, compare with the table, print what became worse
    python -m tools.registers --write     compile all and write the table anew
    python -m tools.registers --targets sm_80 gfx942 --only linear

No card is needed. What Triton compiled before comes out of its cache (TRITON_CACHE_DIR), so that only what changed takes time.
The table: registers of a thread, bytes spilled by a thread, bytes of shared memory of a program.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).resolve().parent.parent / "benchmarks/results/registers.csv"
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32), "sm_89": ("cuda", 89, 32), "sm_90": ("cuda", 90, 32), "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64), "gfx1100": ("hip", "gfx1100", 32), "gfx1201": ("hip", "gfx1201", 32),
}  # fmt: skip
SLACK = 1.1  # registers move a little with every release of Triton
# Bytes of shared memory that a program may have; a kernel that wants more does not start at all.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10,
          "gfx942": 64 << 10, "gfx1100": 64 << 10, "gfx1201": 64 << 10}  # fmt: skip


class Found(NamedTuple):
    """What an object asks of a card, per thread (registers, spilled bytes) and per program (bytes of shared memory)."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int


def compile_all(names: Iterable[str], targets: Iterable[str], processes: int = 2) -> list[Found]:
    """Compiles these cases for these targets in processes of their own, in the order of their names."""
    work = [(name, target) for name in names for target in targets]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compiled, work, chunksize=4))


def worse(found: Iterable[Found], table: Iterable[Found]) -> list[str]:
    """A sentence for every object that spills more, takes a tenth more registers than the table says, or fits no card."""
    known = {(row.kernel, row.target): row for row in table}
    complaints = []
    for row in found:
        before, where = known.get((row.kernel, row.target)), f"{row.kernel} on {row.target}"
        if row.shared > SHARED[row.target]:
            complaints.append(f"{where} wants {row.shared} bytes of shared memory, the card has {SHARED[row.target]}")
        if before is None:
            complaints.append(f"{where} is not in the table")
        elif row.spilled > before.spilled:
            complaints.append(f"{where} spills {row.spilled} bytes, {before.spilled} before")
        elif row.registers > before.registers * SLACK:
            complaints.append(f"{where} takes {row.registers} registers, {before.registers} before")
    return complaints


def read(path: Path = TABLE) -> list[Found]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Found(row["kernel"], row["target"], *(int(row[name]) for name in Found._fields[2:]))
                for row in csv.DictReader(file)]


def write(rows: Iterable[Found], path: Path = TABLE) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Found._fields)
        writer.writerows(sorted(rows))


@cache
def known_cases() -> dict[str, Any]:
    # Compiled kernels, not interpreted ones; and Triton 3.9 warns unless it is told to go on fusing products and sums.
    os.environ.update(TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")
    from dsv4_kernels.ahead import cases

    return cases()


def _compiled(work: tuple[str, str]) -> Found:
    from triton import compile as compiled_by_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, target = work
    case = known_cases()[name].on(target)
    source = ASTSource(case.kernel, case.signature(), dict(case.constants), case.multiples())
    options = {"num_warps": case.warps, "num_stages": case.stages}
    try:
        made = compiled_by_triton(source, target=GPUTarget(*TARGETS[target]), options=options)
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for {target}: {error}") from error
    registers, spilled = _of_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else _of_nvidia(made.asm["cubin"])
    return Found(name, target, registers, spilled, made.metadata.shared)


def _of_nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a cubin. A kernel of ours needs no stack but for what it spills."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found, f"cuobjdump says nothing of registers:\n{said.stdout}"
    return int(found[1]), int(found[2])


def _of_amd(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch) of an object, as its notes tell."""
    notes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly))
    return int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.registers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table anew")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="cases whose names begin so (linear, moe._down)")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(arguments)
    names = [name for name in known_cases() if name.startswith(chosen.only)]
    found = compile_all(names, chosen.targets, chosen.processes)
    if chosen.write:
        fresh = {(row.kernel, row.target) for row in found}
        kept = [row for row in read() if (row.kernel, row.target) not in fresh and row.kernel in known_cases()]
        write([*found, *kept])
        complaints = [line for line in worse(found, found) if "shared memory" in line]
    else:
        complaints = worse(found, read())
    print("\n".join([*complaints, f"{len(found)} objects, {sum(row.spilled > 0 for row in found)} of them spill"]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
