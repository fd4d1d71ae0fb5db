"""`verify`, `rm` and `list` of models that were pulled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from dsv4cli import paths
from dsv4cli.commands import list as listing
from dsv4cli.registry import store, usage
from tests.hub.conftest import REPO, assert_same, incoming, installed
from tests.support.hub import Fault, Hub
from tests.support.program import Outcome
from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
BIG, THIRD = "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"


@pytest.fixture
def pulled(run_dsv4: Run, hub: Hub) -> Path:
    assert run_dsv4("pull", REPO).code == 0
    return installed()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_and_only_its_shard_fetched(run_dsv4: Run, hub: Hub, pulled: Path, published: Path) -> None:
    assert run_dsv4("verify", REPO).code == 0
    flip(pulled / THIRD, -1000)
    found = run_dsv4("verify", REPO)
    assert found.code == 4
    assert f"{REPO}: {THIRD} has other content than was published." in found.err
    assert f"dsv4 verify {REPO} --repair" in found.err
    hub.log.clear()
    done = run_dsv4("verify", "--repair")
    assert done.code == 0, done.err
    assert [(request.method, request.path) for request in hub.log] == [("GET", THIRD)]
    assert_same(published)
    assert run_dsv4("verify", REPO).code == 0


def test_missing_and_short_files_are_repaired(run_dsv4: Run, hub: Hub, pulled: Path, published: Path) -> None:
    (pulled / "config.json").unlink()
    with (pulled / THIRD).open("rb+") as shard:
        shard.truncate(5)
    found = run_dsv4("verify", REPO)
    assert found.code in (2, 4)
    hub.log.clear()
    assert run_dsv4("verify", REPO, "--repair").code == 0
    assert sorted(hub.fetched()) == ["config.json", THIRD]
    assert_same(published)


def test_a_repair_that_fails_leaves_the_model_as_it_was(run_dsv4: Run, hub: Hub, pulled: Path, published: Path) -> None:
    flip(pulled / THIRD, 5000)
    damaged = (pulled / THIRD).read_bytes()
    hub.faults = [Fault(THIRD, times=1, cut=50_000), Fault(THIRD, cut=0)]
    assert run_dsv4("verify", REPO, "--repair").code == 4
    assert (pulled / THIRD).read_bytes() == damaged
    hub.faults = []
    assert run_dsv4("verify", REPO, "--repair").code == 0
    assert [request.range for request in hub.log if request.path == THIRD][-1] == "bytes=50000-"
    assert_same(published)


@pytest.mark.parametrize("name", [THIRD, "config.json"])
def test_a_model_in_the_hubs_cache_is_repaired_there(run_dsv4: Run, hub: Hub, published: Path, name: str) -> None:
    snapshot = Path(huggingface_hub.snapshot_download(REPO, endpoint=hub.address, cache_dir=paths.hub_cache()))
    assert run_dsv4("verify", REPO).code == 0
    flip(snapshot / name, 1)
    found = run_dsv4("verify", REPO)
    assert (found.code, f"{REPO}: {name} has other content" in found.err) == (4, True), found.err
    hub.log.clear()
    done = run_dsv4("verify", REPO, "--repair")
    assert done.code == 0, done.err
    assert hub.fetched() == [name]
    assert (snapshot / name).is_symlink()
    assert (snapshot / name).read_bytes() == (published / name).read_bytes()
    (snapshot / THIRD).resolve().unlink()
    with (snapshot / BIG).open("rb+") as shard:
        shard.truncate(9)
    hub.log.clear()
    assert run_dsv4("verify", REPO, "--repair").code == 0
    assert sorted(hub.fetched()) == [BIG, THIRD]
    assert run_dsv4("verify", REPO).code == 0
    assert not paths.models().joinpath(installed().name).exists()


def test_what_nobody_published_cannot_be_compared(run_dsv4: Run, published: Path) -> None:
    paths.models().mkdir(parents=True)
    shutil.copytree(published, paths.models() / "mine")
    (paths.models() / "mine" / store.MANIFEST).write_text(json.dumps({"name": "mine"}))
    assert "the headers are sound" in run_dsv4("verify", str(paths.models() / "mine")).err
    (paths.models() / "mine" / THIRD).unlink()
    assert run_dsv4("verify", str(paths.models() / "mine")).code == 4
    assert run_dsv4("verify", "flash").code == 1


def test_rm_frees_what_it_says(run_dsv4: Run, hub: Hub, pulled: Path) -> None:
    refused = run_dsv4("rm", REPO)
    assert (refused.code, pulled.exists()) == (2, True)
    done = run_dsv4("rm", REPO, "--yes")
    assert done.code == 0
    assert "3.1 MB freed." in done.err
    assert not pulled.exists()
    assert [path for path in paths.models().rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert run_dsv4("rm", REPO, "--yes").code == 2


def test_rm_of_a_model_on_its_way_in(run_dsv4: Run, hub: Hub) -> None:
    hub.faults = [Fault(THIRD, status=403)]
    assert run_dsv4("pull", REPO, "--max-workers", "1").code == 4
    assert incoming().is_dir()
    assert run_dsv4("rm", REPO, "--yes").code == 0
    assert not incoming().exists()


@pytest.mark.parametrize("name", ["tiny", "flash"])
def test_rm_refuses_what_is_not_its_own(run_dsv4: Run, published: Path, name: str) -> None:
    assert run_dsv4("rm", name, "--yes").code == 2
    assert run_dsv4("rm", str(published), "--yes").code == 2
    assert published.is_dir()


def test_rm_asks(hub: Hub, pulled: Path) -> None:
    terminal = Terminal(["-m", "dsv4cli", "rm", REPO], columns=100)
    terminal.wait_for("Remove it? [y/N]")
    terminal.type("\r")
    assert terminal.wait_for_end() == 130
    assert pulled.exists()
    terminal = Terminal(["-m", "dsv4cli", "rm", REPO], columns=100)
    terminal.wait_for("Remove it? [y/N]")
    terminal.type("y\r")
    assert terminal.wait_for_end() == 0
    assert not pulled.exists()


def test_list_tells_context_use_and_verification(run_dsv4: Run, hub: Hub, pulled: Path) -> None:
    (told,) = [entry for entry in json.loads(run_dsv4("list", "--json").out) if entry["name"] == REPO]
    assert (told["context"], told["used"], told["license"]) == (1048576, None, "MIT")
    assert told["verified"] is not None
    usage.note(pulled, "used")
    row = next(line for line in run_dsv4("list").out.splitlines() if line.startswith(REPO))
    assert row.split() == [REPO, "3.1", "MB", "official", "1M", "today", "today", "april", str(pulled)]


@pytest.mark.parametrize(("count", "shown"), [(1048576, "1M"), (131072, "128K"), (1000, "1000"), (0, "-")])
def test_contexts_are_short(count: int, shown: str) -> None:
    assert listing.tokens(count) == shown


def test_notes_that_cannot_be_written_or_read_do_no_harm(run_dsv4: Run, hub: Hub, pulled: Path) -> None:
    (paths.cache() / "usage.json").write_text("[1, {")
    assert usage.when(pulled, "used") is None
    shutil.rmtree(paths.cache())
    paths.cache().write_text("a file")
    usage.note(pulled, "used")
    assert run_dsv4("list").code == 0
