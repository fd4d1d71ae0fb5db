"""The memory plan: what fits, what is refused with which numbers, and where the available bytes are read."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant.files.headers import Header, read_header
from dsv4cli.engine.memory import (
    DEFAULT_CONTEXT,
    SMALLEST_CONTEXT,
    MemoryPlan,
    available_memory,
    in_bytes,
    plan_model,
    resident_bytes,
    swapped_bytes,
)
from dsv4cli.errors import CapacityError, UsageError
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.sizes import CACHE_BYTES
from tests.support.synth import Checkpoint, Shape

GB = 10**9


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    return read_header(Checkpoint(Shape(), seed=3).write(tmp_path_factory.mktemp("models") / "random"))


def plan(header: Header, ctx: int | None, available: int | None, **options: Any) -> MemoryPlan:
    return plan_model(header, "flash", ctx=ctx, numerics="official", available=available, program=1000, **options)


def test_the_sum_is_exact() -> None:
    made = MemoryPlan(context=10, program=1, vocabulary=20, weights=300, expanded=4000, state=50_000, snapshots=600_000,
                      scratch=7_000_000, available=7_654_321)
    assert made.needed == 7_654_321
    assert made.fits


def test_a_given_context_is_kept_or_refused(header: Header) -> None:
    needed = plan(header, 1000, None).needed
    assert plan(header, 1000, needed).fits
    made = plan(header, 1000, needed - 1)
    assert made.context == 1000
    with pytest.raises(CapacityError, match=r"flash needs [\d.]+ MB .*for 1000 tokens.* but only [\d.]+ MB") as caught:
        made.demand_fit("flash")
    assert caught.value.exit_code == 3
    assert "--ctx" in caught.value.hint


def test_the_default_context_is_the_longest_that_fits(header: Header) -> None:
    assert plan(header, None, None).context == DEFAULT_CONTEXT
    assert plan(header, None, 100 * GB).context == DEFAULT_CONTEXT
    assert plan(header, None, plan(header, 8192, None).needed + 1).context == 8192
    assert plan(header, None, 10).context == SMALLEST_CONTEXT


def test_weights_are_counted_as_far_as_they_are_read(header: Header) -> None:
    """Not the drafter that is left on the disk; of the table of embeddings the rows of tokens that may occur."""
    roles = {role: sum(info.nbytes for info in infos) for role, infos in header.by_role().items()}
    trunk = sum(size for role, size in roles.items() if role != "mtp")
    assert plan(header, 4096, None).weights == trunk
    row = roles["embed"] - 65_536
    assert plan(header, 1, None).weights == trunk - max(0, row)


def test_only_without_kernels_matrices_are_decoded(header: Header) -> None:
    """Nor where the weights are small enough to be expanded once."""
    c = header.config
    small, large = plan(header, 512, None, decodes=True), plan(unlimited(header), 512, None, decodes=True)
    assert small.scratch == plan(header, 512, None).scratch
    assert large.scratch - small.scratch == 4 * c.vocab_size * c.hidden_size


def unlimited(header: Header) -> Header:
    """The same header of files that are too large to be expanded."""
    tensors = {name: info._replace(nbytes=info.nbytes * 10**6) for name, info in header.tensors.items()}
    return replace(header, tensors=tensors)


def test_routed_experts_may_stay_on_the_disk(header: Header) -> None:
    large = unlimited(header)
    experts = sum(info.nbytes for info in large.by_role()["routed_expert"])
    whole = plan(large, 512, None)
    assert (whole.experts, whole.on_disk, whole.runs) == (experts, 0, True)
    some = plan(large, 512, whole.needed - experts // 2)
    assert (some.fits, some.runs, some.on_disk) == (False, True, experts // 2)
    assert f"of {in_bytes(experts)}, the rest" in some.experts_told()
    some.demand_fit("flash")
    assert plan(large, 512, whole.least).runs
    few = plan(large, 512, whole.least - 1)
    assert not few.runs
    with pytest.raises(CapacityError, match=r"flash needs [\d.]+ .B of memory .*, with [\d.]+ .B of experts left .*") as refused:
        few.demand_fit("flash")
    assert f"routed experts {in_bytes(few.busy)}" in refused.value.message  # the parts are those of what is needed
    assert few.needed - few.on_disk == few.least


def test_what_one_layer_reads_for_a_token_has_to_fit(header: Header) -> None:
    c, whole = header.config, plan(unlimited(header), 512, None)
    assert whole.busy * c.num_hidden_layers * c.n_routed_experts == whole.experts * c.num_experts_per_tok
    assert whole.least == whole.needed - whole.experts + whole.busy


def test_a_default_context_is_shortened_for_weights_but_not_for_some_of_them(header: Header) -> None:
    """Down to SMALLEST_CONTEXT where then all fit; where not, the longest that leaves room for what has to."""
    large = unlimited(header)
    assert plan(large, None, plan(large, 512, None).needed).context == 512
    assert plan(large, None, plan(large, 512, None).needed - 1).context == DEFAULT_CONTEXT
    assert plan(large, None, plan(large, 4096, None).least).context == 4096
    assert plan(large, None, 10).context == SMALLEST_CONTEXT


def test_experts_of_small_models_are_expanded_and_stay(header: Header) -> None:
    assert plan(header, 512, None).experts == 0


@pytest.mark.parametrize("ctx", [0, -5, (1 << 20) + 1])
def test_a_context_the_model_does_not_have_is_refused(header: Header, ctx: int) -> None:
    with pytest.raises(UsageError, match=f"{ctx} tokens .* 1 to {header.config.max_position_embeddings}"):
        plan(header, ctx, None)


@pytest.mark.parametrize("numerics", ["plain", "official"])
def test_caches_are_priced_as_they_are_made(numerics: str) -> None:
    assert CACHE_BYTES[numerics] == numerics_named(numerics).cache.itemsize


PEAK = """
import random, sys
from dsv4cli import Engine
engine = Engine.open("tiny", ctx=int(sys.argv[1]), threads=1)
session, numbers = engine.session(), random.Random(1)
session.sync([numbers.randrange(engine.config.vocab_size) for _ in range(engine.ctx - 1)])
session.step(5)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, engine.plan.needed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("ctx", [512, 2500, 6000])
def test_the_plan_is_what_a_full_context_takes(ctx: int) -> None:
    """Within 5 % of the process's peak of resident memory, weights in the page cache among it."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(ctx)], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    peak, planned = map(int, done.stdout.split())
    assert planned == pytest.approx(peak, rel=0.05)


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
        "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 60000\nactive_file 40000\n",
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
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 30000\ntotal_active_file 20000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    })
    assert available_memory(root) == 150_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process(limit: str) -> None:
    code = ("import resource, sys\nfrom dsv4cli.engine.memory import address_space, available_memory\n"
            f"resource.setrlimit(resource.{limit}, (10**9, resource.RLIM_INFINITY))\n"
            "print(available_memory(), address_space())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": ":".join(sys.path)})
    left, addresses = done.stdout.split()
    assert 500_000_000 < int(left) < 10**9
    assert addresses == (left if limit == "RLIMIT_AS" else "None")


def test_swap_counts_against_what_is_free(tmp_path: Path) -> None:
    assert swapped_bytes(tmp_path) == 0
    told = MEMINFO + "SwapTotal:     1000 kB\nSwapFree:       400 kB\n"
    assert swapped_bytes(system(tmp_path, {"proc/meminfo": told})) == 600 * 1024
    made = MemoryPlan(1, program=1, vocabulary=0, weights=80, expanded=0, state=0, snapshots=0, scratch=0, available=100,
                      experts=50, busy=10)
    assert (made.least, made.swaps(59), made.swaps(60), made.swaps(0)) == (41, False, True, False)


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
