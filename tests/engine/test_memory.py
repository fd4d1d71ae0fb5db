"""The memory plan: what fits, what is refused with which numbers, and where the available bytes are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4cli.engine.memory import (
    DEFAULT_CONTEXT,
    MemoryPlan,
    available_memory,
    in_bytes,
    plan_memory,
    resident_bytes,
)
from dsv4cli.errors import CapacityError, UsageError

GB = 10**9


def plan(ctx: int | None, available: int | None, *, weights: int = 0, model_ctx: int = 1 << 20) -> MemoryPlan:
    return plan_memory("flash", ctx=ctx, model_ctx=model_ctx, weights=weights, expanded=0,
                       state_bytes=lambda tokens: tokens * 500, scratch=500, available=available)


def test_the_sum_is_exact() -> None:
    made = MemoryPlan(context=10, weights=1, expanded=20, state=300, snapshots=4000, scratch=50_000, available=54_321)
    assert made.needed == 54_321
    assert made.fits


def test_a_given_context_is_kept_or_refused() -> None:
    assert plan(1000, 1_000_500).context == 1000
    with pytest.raises(CapacityError, match=r"flash needs 1\.0 MB .*for 1000 tokens.* but only 900\.0 KB") as caught:
        plan(1000, 900_000)
    assert caught.value.exit_code == 3
    assert "--ctx" in caught.value.hint


def test_the_default_context_is_the_longest_that_fits() -> None:
    assert plan(None, None).context == DEFAULT_CONTEXT
    assert plan(None, 100 * GB).context == DEFAULT_CONTEXT
    assert plan(None, 9_000_000).context == 8192
    assert plan(None, 100 * GB, model_ctx=2048).context == 2048


def test_weights_alone_can_be_too_much() -> None:
    with pytest.raises(CapacityError, match=r"160\.0 GB.*64\.0 GB"):
        plan(None, 64 * GB, weights=160 * GB)


@pytest.mark.parametrize("ctx", [0, -5, (1 << 20) + 1])
def test_a_context_the_model_does_not_have_is_refused(ctx: int) -> None:
    with pytest.raises(UsageError, match=f"{ctx} tokens .* 1 to {1 << 20}"):
        plan(ctx, None)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable:    2000 kB\n"


def test_without_groups_the_system_decides(tmp_path: Path) -> None:
    assert available_memory(system(tmp_path, {"proc/meminfo": MEMINFO})) == 2_048_000


def test_nobody_tells(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_the_tightest_group_of_version_2_decides(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/memory.max": "1000000\n", "sys/fs/cgroup/user/memory.current": "600000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 100000\n",
    })
    assert available_memory(root) == 500_000  # the page cache among what is used can be reclaimed


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/docker/abc\n",
        "sys/fs/cgroup/memory.max": "300000\n", "sys/fs/cgroup/memory.current": "100000\n",
    })
    assert available_memory(root) == 200_000


def test_groups_of_version_1(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "8:pids:/\n4:cpu,memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "900000",
        "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 50000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    })
    assert available_memory(root) == 150_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_this_machine_has_plausible_numbers() -> None:
    assert 10**7 < (available_memory() or 0) < 10**15
    assert 10**6 < resident_bytes() < 10**12


def test_sizes_are_readable() -> None:
    assert [in_bytes(n) for n in (0, 999, 1000, 123_456_789, 159_609_485_896, 5 * 10**15)] == [
        "0 B", "999 B", "1.0 KB", "123.5 MB", "159.6 GB", "5000.0 TB"]


def test_the_plan_needs_no_torch() -> None:
    rooms = "dsv4cli.engine.memory, dsv4cli.engine.sampling, dsv4cli.engine.records"
    code = f"import sys, {rooms}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "False"
