"""Every Triton kernel compiles for every card, and asks no more of it than the table in benchmarks/results says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.registers import TABLE, Found, read, worse

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def triton_folder(pytestconfig: pytest.Config) -> Path:
    """Where Triton keeps what it compiled, for runs to come: only what changed is compiled again."""
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("triton"))


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, since this one may have imported the kernels for the interpreter."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "quant"), str(ROOT / "kernels")])
    own = os.environ | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=own, capture_output=True, text=True, check=False)


def test_registers_and_spills_do_not_grow(triton_folder: Path) -> None:
    done = python(triton_folder, "-m", "tools.registers")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


KERNELS = """
import ast, json, textwrap
from importlib import import_module
from importlib.util import find_spec
from dsv4_kernels.ahead import cases
from dsv4_kernels.backends import OPERATIONS
known = {(case.kernel.__module__, case.kernel.__name__) for case in cases().values()}
lacking = []
for op in OPERATIONS:
    if find_spec(f"dsv4_kernels.{op}.gpu"):
        module = import_module(f"dsv4_kernels.{op}.gpu")
        for name, thing in vars(module).items():
            source = getattr(thing, "raw_src", None)
            if source and "program_id" in "".join(source) and (thing.__module__, thing.__name__) not in known:
                lacking.append(f"{op}.{name}")
print(json.dumps({"lacking": lacking, "cases": list(cases())}))
"""


def test_every_kernel_has_a_case_and_every_row_a_kernel(triton_folder: Path) -> None:
    done = python(triton_folder, "-c", KERNELS)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["lacking"] == []
    assert {row.kernel for row in read()} == set(told["cases"]), f"write {TABLE.name} anew: python -m tools.registers --write"


AS_LAUNCHED = """
from dsv4_kernels.ahead import cases
from dsv4_kernels.tuned import sized
for name, case in cases().items():
    for target in ("sm_90", "gfx1100"):
        found = case.on(target)
        if case.sizes:
            assert found.warps == sized(case.sizes, target)["warps"], name
        for constant, value in case.on_amd.items():
            assert found.constants[constant] == (value if target == "gfx1100" else case.constants[constant]), name
print(sum(bool(case.on_amd) for case in cases().values()))
"""


def test_cases_are_compiled_as_a_target_launches_them(triton_folder: Path) -> None:
    done = python(triton_folder, "-c", AS_LAUNCHED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


def test_what_became_worse_is_told() -> None:
    before = [Found("a", "sm_90", 100, 0, 1024)]
    assert worse([Found("a", "sm_90", 110, 0, 2048)], before) == []
    assert "111 registers" in worse([Found("a", "sm_90", 111, 0, 0)], before)[0]
    assert "spills 8" in worse([Found("a", "sm_90", 90, 8, 0)], before)[0]
    assert "not in the table" in worse([Found("b", "sm_90", 1, 0, 0)], before)[0]
    assert "shared memory" in worse([Found("a", "sm_90", 90, 0, 1 << 20)], before)[0]
