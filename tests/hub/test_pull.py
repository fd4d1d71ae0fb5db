"""`dsv4 pull` against a hub that works: what is fetched, from where, and what is not fetched twice."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from dsv4_quant.files import open_source
from dsv4cli import paths
from dsv4cli.commands import transfer
from dsv4cli.registry import catalog, store
from dsv4cli.registry import hub as client
from dsv4cli.registry.download import Download, State
from dsv4cli.registry.incoming import Incoming
from tests.hub.conftest import REPO, assert_same, installed, shards
from tests.support import gguf_writer
from tests.support.hub import Fault, Hub
from tests.support.program import Outcome
from tests.support.terminal import Terminal

Run = Callable[..., Outcome]
BIG = "model-00002-of-00004.safetensors"


def test_a_pull_installs_what_was_published(run_dsv4: Run, hub: Hub, published: Path) -> None:
    done = run_dsv4("pull", REPO)
    assert (done.code, done.out) == (0, "")
    assert_same(published)
    assert sorted(hub.fetched()) == sorted(file.name for file in published.iterdir() if file.is_file())
    manifest = json.loads((installed() / store.MANIFEST).read_text())
    assert (manifest["name"], manifest["repo"], manifest["revision"]) == (REPO, REPO, hub.branches[REPO, "main"])
    files = hub.repos[REPO][manifest["revision"]]
    assert {file["path"]: (file["size"], file["sha256"]) for file in manifest["files"]} == {
        path: (file.size, file.sha256) for path, file in files.items() if "/" not in path}
    entry = catalog.resolve(REPO)
    assert (entry.path, entry.context, entry.license) == (installed(), 1048576, "MIT")
    assert run_dsv4("show", REPO).code == 0


def test_a_pull_by_a_known_name_takes_its_pinned_revision(run_dsv4: Run, hub: Hub, published: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = hub.branches[REPO, "main"]
    (published / "README.md").write_text("later\n")
    known = {"flash": catalog.Entry("flash", repo=REPO, revision=pinned, release="0731")}
    monkeypatch.setattr(catalog, "catalog", lambda: known)
    later = shutil.copytree(published, published.with_name("later"))
    (published / "README.md").write_text("a card\n")
    hub.publish(REPO, later)
    assert run_dsv4("pull", "flash").code == 0
    assert_same(published, "flash")
    done = run_dsv4("pull", "Flash")
    assert f"newer revision, {hub.branches[REPO, 'main'][:12]}" in done.err
    before = len(hub.fetched())
    assert run_dsv4("pull", "flash", "--update").code == 0
    assert_same(later, "flash")
    assert hub.fetched()[before:] == ["README.md"]
    assert "newest revision already" in run_dsv4("pull", "flash", "--update").err
    assert "The hub has no newer one" in run_dsv4("pull", "flash").err
    assert catalog.resolve("flash").release == "0731"


def test_an_installed_model_needs_no_hub(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_dsv4("pull", REPO).code == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = run_dsv4("pull", REPO)
    assert done.code == 0
    assert "is not known: HF_HUB_OFFLINE is set" in done.err


def test_include_fetches_more(run_dsv4: Run, hub: Hub) -> None:
    assert run_dsv4("pull", REPO, "--include", "inference/*").code == 0
    assert (installed() / "inference/model.py").read_text() == "pass\n"
    assert run_dsv4("verify", REPO).code == 0


def test_what_is_part_of_dsv4_or_a_path_is_not_fetched(run_dsv4: Run, hub: Hub, published: Path) -> None:
    assert "nothing to fetch" in run_dsv4("pull", "tiny").err
    assert run_dsv4("pull", str(published)).code == 2
    assert run_dsv4("pull", "flsh").code == 2
    assert hub.log == []


def test_a_complete_copy_in_the_hubs_cache_is_used_as_it_is(run_dsv4: Run, hub: Hub) -> None:
    huggingface_hub.snapshot_download(REPO, endpoint=hub.address, cache_dir=paths.hub_cache())
    before = len(hub.fetched())
    done = run_dsv4("pull", REPO)
    assert done.code == 0
    assert str(paths.hub_cache()) in done.err
    assert len(hub.fetched()) == before
    assert not paths.models().exists()
    assert "7 files" in run_dsv4("verify", REPO).err  # its blobs are called by their digests
    assert run_dsv4("rm", REPO, "--yes").code == 0
    assert catalog.resolve(REPO).path is None


def test_shards_in_the_hubs_cache_are_not_fetched_again(run_dsv4: Run, hub: Hub, published: Path) -> None:
    cached = Path(huggingface_hub.hf_hub_download(REPO, BIG, endpoint=hub.address, cache_dir=paths.hub_cache())).resolve()
    before = len(hub.fetched())
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert BIG not in hub.fetched()[before:]
    assert (installed() / BIG).samefile(cached)  # one copy on the disk


def test_a_damaged_shard_in_the_hubs_cache_is_left_alone(run_dsv4: Run, hub: Hub, published: Path) -> None:
    cached = Path(huggingface_hub.hf_hub_download(REPO, BIG, endpoint=hub.address, cache_dir=paths.hub_cache())).resolve()
    damaged = b"!" + cached.read_bytes()[1:]
    cached.write_bytes(damaged)
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert cached.read_bytes() == damaged


def test_one_gguf_of_several_is_named(run_dsv4: Run, hub: Hub, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ggufs"
    folder.mkdir()
    for name in ("V4-Q4_K_M.gguf", "V4-Q8_0.gguf"):
        gguf_writer.write(open_source(published), folder / name)
    hub.publish("test/ggufs", folder)
    many = run_dsv4("pull", "test/ggufs")
    assert (many.code, "holds 2 models" in many.err, "test/ggufs:V4-Q8_0.gguf" in many.err) == (2, True, True), many.err
    none = run_dsv4("pull", "test/ggufs:q4_k_s")
    assert (none.code, "holds no q4_k_s" in none.err, "V4-Q4_K_M.gguf" in none.err) == (2, True, True)
    assert run_dsv4("pull", "test/ggufs:q4_k_m").code == 0
    entry = catalog.resolve("test/ggufs:q4_k_m")
    assert entry.path == installed("test/ggufs:q4_k_m") / "V4-Q4_K_M.gguf"
    assert entry.quant == "q4_k_m"
    assert hub.fetched() == ["V4-Q4_K_M.gguf"]
    assert run_dsv4("show", "test/ggufs:q4_k_m").code == 0
    assert run_dsv4("verify", "test/ggufs:q4_k_m").code == 0
    assert run_dsv4("rm", "test/ggufs:q4_k_m", "--yes").code == 0
    assert not installed("test/ggufs:q4_k_m").exists()


def test_a_proxy_is_honoured(run_dsv4: Run, hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub.address)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    huggingface_hub.close_session()
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_the_rate_is_limited(run_dsv4: Run, hub: Hub, published: Path) -> None:
    nbytes = sum(shard.stat().st_size for shard in shards(published))
    began = time.monotonic()
    assert run_dsv4("pull", REPO, "--limit-rate", f"{nbytes // 2}").code == 0
    assert 1.7 < time.monotonic() - began < 4
    assert_same(published)


@pytest.mark.parametrize(("text", "rate"), [("500K", 5e5), ("20M", 20e6), ("1.5g", 1.5e9), ("123", 123.0), ("2MB/s", 2e6)])
def test_rates_are_read(text: str, rate: float) -> None:
    assert transfer.rate_limit(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-3M", "0", "nan", "1e99", "M"])
def test_rates_that_are_none(run_dsv4: Run, text: str) -> None:
    done = run_dsv4("pull", REPO, "--limit-rate", text)
    assert (done.code, "--limit-rate is" in done.err) == (2, True)


def test_files_come_at_once_but_not_more_than_asked(run_dsv4: Run, hub: Hub) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def enter() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.1)
        with lock:
            now[0] -= 1

    hub.faults = [Fault("safetensors$", act=enter)]
    assert run_dsv4("pull", REPO, "--max-workers", "3").code == 0
    assert most[0] == 3


def test_plain_lines_where_there_is_no_terminal(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "EVERY", 0.15)
    hub.faults = [Fault("safetensors$", slow=0.01)]
    lines = [line for line in run_dsv4("pull", REPO).err.splitlines() if line.startswith(f"{REPO}: ") and "%" in line]
    assert len(lines) >= 2
    assert "MB/s" in lines[-1]
    assert re.search(r" left \(.*model-0000", lines[0])  # the index may still be on its way
    assert run_dsv4("rm", REPO, "--yes").code == 0
    assert run_dsv4("pull", REPO, "--quiet").err == ""


def test_on_a_terminal_it_asks_and_draws(hub: Hub, published: Path) -> None:
    hub.faults = [Fault("safetensors$", slow=0.005)]
    surroundings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    no = Terminal(["-m", "dsv4cli", "pull", REPO], columns=100, env=surroundings)
    no.wait_for("Fetch it? [Y/n]")
    no.type("n\r")
    assert no.wait_for_end() == 130
    yes = Terminal(["-m", "dsv4cli", "pull", REPO], columns=100, env=surroundings)
    yes.wait_for("Fetch it? [Y/n]")
    yes.type("\r")
    yes.wait_for("  model-0000")
    yes.wait_for("MB/s")
    assert yes.wait_for_end() == 0
    assert_same(published)


def test_a_chat_with_a_model_that_is_not_here_offers_to_fetch_it(hub: Hub, published: Path) -> None:
    terminal = Terminal(["-m", "dsv4cli", "chat", REPO], columns=100,
                        env={"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"})
    terminal.wait_for(f"{REPO} is not on this machine.")
    terminal.wait_for("free on the disk of")
    terminal.wait_for("Fetch it? [Y/n]")
    terminal.type("y\r")
    terminal.wait_for(f"{REPO} is here:")
    terminal.type("\x03\x04")
    assert_same(published)


def test_without_a_terminal_a_missing_model_is_said(run_dsv4: Run) -> None:
    done = run_dsv4("run", "flash", "hello")
    assert done.code == 1
    assert "dsv4 pull flash" in done.err


def test_each_file_can_be_handed_over_and_deleted(hub: Hub, published: Path, tmp_path: Path) -> None:
    """The seam of quantising while it streams: no more files lie on the disk than there are workers. What is here already is
    handed over without being fetched."""
    listing = client.listing(REPO)
    files = [file for file in listing.files if file.path.endswith(".safetensors")]
    seen, most, folder = {}, [0], tmp_path / "incoming"

    def consume(file: client.RemoteFile, path: Path) -> None:
        most[0] = max(most[0], len([one for one in folder.iterdir() if one.suffix in (".safetensors", ".part")]))
        seen[file.path] = path.read_bytes()
        if file is not files[-1]:
            path.unlink()

    for state in Download(REPO, listing.commit, files, Incoming(folder), workers=2, arrived=consume).run():
        assert state.done <= state.total + max(file.size for file in files)
    assert seen == {shard.name: shard.read_bytes() for shard in shards(published)}
    assert most[0] <= 2
    before = len(hub.fetched())
    seen.clear()
    state = list(Download(REPO, listing.commit, files[-1:], Incoming(folder), arrived=consume).run())[-1]
    assert (state.fetched, state.done, list(seen)) == (0, state.total, [files[-1].path])
    assert len(hub.fetched()) == before


def test_a_file_begins_when_it_is_admitted(hub: Hub, tmp_path: Path) -> None:
    listing = client.listing(REPO)
    files = [file for file in listing.files if file.path.endswith(".safetensors")]
    under_way: list[str] = []
    most = [0]

    def admitted(file: client.RemoteFile) -> bool:
        if under_way:
            return False
        under_way.append(file.path)
        return True

    def gone(file: client.RemoteFile, path: Path) -> None:
        most[0] = max(most[0], len(list((tmp_path / "incoming").glob("*.part"))))
        under_way.remove(file.path)

    for _ in Download(REPO, listing.commit, files, Incoming(tmp_path / "incoming"), arrived=gone, admitted=admitted).run():
        pass
    assert (most[0], len(hub.fetched())) == (0, len(files))


def test_states_tell_rate_and_time_left() -> None:
    state = State(1000, settled=500, fetched=250, began=time.monotonic() - 10)
    assert round(state.rate) == 25
    assert state.seconds_left is not None
    assert round(state.seconds_left) == 20
    assert transfer.duration(7384) == "2 h 3 min"
