"""Everything that can go wrong between here and the hub: a sentence, exit code 3 or 4, and what is good is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import huggingface_hub
import pytest

from dsv4cli import paths
from dsv4cli.registry import download, store
from dsv4cli.registry import hub as client
from dsv4cli.registry import incoming as receiving
from tests.hub.conftest import REPO, assert_same, incoming, installed, shards
from tests.support.hub import Fault, Hub, stored
from tests.support.program import Outcome, environment

Run = Callable[..., Outcome]
SECOND = "model-00002-of-00004.safetensors"


def failed(done: Outcome, code: int, *said: str) -> None:
    """The exit code, one error line and one hint, and that nothing is installed."""
    assert done.code == code, done.err
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], done.err
    assert "unexpected" not in done.err
    assert [text for text in said if text not in "\n".join(lines)] == []
    assert not installed().exists()


def bytes_kept() -> int:
    """Of the weights, verified or not."""
    return sum(path.stat().st_size for path in incoming().rglob("*-of-00004.safetensors*"))


def test_no_network(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    failed(run_dsv4("pull", REPO), 4, "127.0.0.1:9 cannot be reached", "Check the network connection")


def test_a_host_that_has_no_address(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    failed(run_dsv4("pull", REPO), 4, "The name of http://hub.invalid cannot be looked up", "DNS")


def test_a_network_that_goes_away_in_the_middle(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, times=1, cut=70_000), Fault(SECOND, cut=0)]
    failed(run_dsv4("pull", REPO, "--max-workers", "1"), 4, "connection", "What was fetched is kept")
    assert (incoming() / "model-00001-of-00004.safetensors").exists()
    assert next(incoming().glob(f"{SECOND}.*.part")).stat().st_size == 70_000
    hub.faults, before = [], len(hub.log)
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert "model-00001-of-00004.safetensors" not in [request.path for request in hub.log[before:]]
    assert [request.range for request in hub.log[before:] if request.path == SECOND] == ["bytes=70000-"]


@pytest.mark.parametrize(("refusal", "said"), [
    ((401, ""), ("401", "set HF_TOKEN")),
    ((403, ""), ("403", "Ask for access")),
    ((401, "GatedRepo"), ("accepted its terms", "Accept them at")),
    ((403, "GatedRepo"), ("accepted its terms", "Accept them at"))])
def test_a_repo_that_is_not_for_everybody(run_dsv4: Run, hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch,
                                          refusal: tuple[int, str], said: tuple[str, ...]) -> None:
    hub.private[REPO] = refusal
    failed(run_dsv4("pull", REPO), 4, *said)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert {request.token for request in hub.log if request.path == "config.json"} == {"hf_mine"}


def test_a_token_that_is_not_valid(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault("/api", status=401)]
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    failed(run_dsv4("pull", REPO), 4, "does not accept the token", "Make a new one at")


def test_access_that_ends_in_the_middle(run_dsv4: Run, hub: Hub) -> None:
    hub.faults = [Fault(SECOND, status=403)]
    failed(run_dsv4("pull", REPO, "--max-workers", "1"), 4, SECOND, "403")
    assert (incoming() / "model-00001-of-00004.safetensors").exists()


def test_names_that_the_hub_does_not_know(run_dsv4: Run, hub: Hub, published: Path) -> None:
    failed(run_dsv4("pull", "test/modell"), 4, "The hub has no test/modell", "Did you mean test/model?")
    failed(run_dsv4("pull", "nobody/nothing"), 4, "The hub has no nobody/nothing", "HF_TOKEN")
    hub.publish(REPO, published, "preview")
    failed(run_dsv4("pull", f"{REPO}@previw"), 4, f"no revision previw of {REPO}", "main, preview")


def test_a_repo_without_a_model(run_dsv4: Run, hub: Hub, published: Path) -> None:
    for shard in shards(published):
        shard.unlink()
    hub.publish(REPO, published)
    failed(run_dsv4("pull", REPO), 4, "holds neither a checkpoint")


def test_a_range_that_is_refused_once_begins_again(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, times=1, cut=50_000), Fault(SECOND, times=1, status=416)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert [request.range for request in hub.log if request.path == SECOND] == ["", "bytes=50000-", ""]


def test_a_range_that_is_refused_without_one(run_dsv4: Run, hub: Hub) -> None:
    hub.faults = [Fault(SECOND, status=416)]
    failed(run_dsv4("pull", REPO), 4, SECOND, "no more bytes")


@pytest.mark.parametrize("style", ["seconds", "date"])
def test_asked_too_often_it_waits_as_long_as_it_is_told(run_dsv4: Run, hub: Hub, published: Path, style: str) -> None:
    wanted = "1" if style == "seconds" else formatdate(time.time() + 2, usegmt=True)
    hub.faults = [Fault(SECOND, times=1, status=429, headers={"Retry-After": wanted})]
    began = time.monotonic()
    done = run_dsv4("pull", REPO)
    assert time.monotonic() - began >= 1
    assert done.code == 0
    assert "asked too often (429)" in done.err
    assert_same(published)


def test_the_listing_too_is_asked_again(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault("/api", times=1, status=429, headers={"Retry-After": "0"}), Fault("/api", times=1, status=503)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_asked_too_often_for_ever(run_dsv4: Run, hub: Hub) -> None:
    hub.faults = [Fault(SECOND, status=429)]
    failed(run_dsv4("pull", REPO), 4, "asked too often (429)", "kept")


def test_a_server_that_fails_for_a_while_and_for_ever(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, status=503)]
    failed(run_dsv4("pull", REPO), 4, "fails (503)", SECOND)
    assert len([path for path in hub.fetched() if path == SECOND]) == client.TRIES
    hub.faults = [Fault(SECOND, times=5, status=500)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_a_body_that_ends_too_early(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, short=1000)]
    failed(run_dsv4("pull", REPO), 4, f"ends {SECOND} after", "kept")
    assert bytes_kept() == sum(shard.stat().st_size for shard in shards(published)) - 1000
    hub.faults = []
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_a_body_that_was_cut_once(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, times=1, short=1000)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_wrong_bytes_of_the_right_length(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, flip=100_000)]
    true = stored(published / SECOND).sha256
    failed(run_dsv4("pull", REPO, "--max-workers", "1"), 4, f"{SECOND} arrives with the wrong content", true)
    assert hub.fetched().count(SECOND) == 2
    assert not list(incoming().glob(f"{SECOND}*"))
    hub.faults, before = [], len(hub.fetched())
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert "model-00001-of-00004.safetensors" not in hub.fetched()[before:]


def test_wrong_bytes_once_are_fetched_again(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, times=1, flip=100_000), Fault("config.json", times=1, flip=3)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_a_part_with_wrong_bytes_does_not_survive(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault(SECOND, times=1, cut=70_000), Fault(SECOND, cut=0)]
    run_dsv4("pull", REPO)
    part = next(incoming().glob(f"{SECOND}.*.part"))
    part.write_bytes(b"x" * 70_000)
    hub.faults = []
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_a_connection_dropped_at_every_64_kb(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault("safetensors$", cut=65536)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    pieces = sum(-(-shard.stat().st_size // 65536) for shard in shards(published))
    assert len([path for path in hub.fetched() if path.endswith(".safetensors")]) == pieces


def test_a_server_that_ignores_ranges(run_dsv4: Run, hub: Hub, published: Path) -> None:
    size = (published / SECOND).stat().st_size
    hub.faults = [Fault(SECOND, times=1, cut=size // 3), Fault(SECOND, times=1, cut=size // 2, deaf=True),
                  Fault(SECOND, deaf=True)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert hub.fetched().count(SECOND) == 3


@contextmanager
def full_after(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk takes so many bytes more; a last write may fit in part."""
    left, lock, write = [nbytes], threading.Lock(), os.write

    def bounded(descriptor: int, data: list[memoryview]) -> int:
        with lock:
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = write(descriptor, b"".join(data)[: left[0]])
            left[0] -= count
            return count

    with monkeypatch.context() as patched:
        patched.setattr(receiving.os, "writev", bounded)
        yield


def test_a_disk_that_fills_up_in_the_middle(run_dsv4: Run, hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_after(500_001, monkeypatch):
        failed(run_dsv4("pull", REPO), 3, "is full", "GB are left", "kept")
    assert bytes_kept() >= 400_000
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert any(request.range for request in hub.log)


def test_a_disk_that_is_really_full(run_dsv4: Run, hub: Hub, published: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setenv("DSV4_MODELS", str(small))
        failed(run_dsv4("pull", REPO), 3, "needs", "free")
        monkeypatch.setattr(receiving, "free", lambda folder: 10**9)  # somebody else took the space after the plan
        monkeypatch.setattr("dsv4cli.registry.pull.free", lambda folder: 10**9)
        failed(run_dsv4("pull", REPO), 3, "is full")
        assert bytes_kept() >= 300_000
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_too_small_a_disk_is_said_before(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**5))
    failed(run_dsv4("pull", REPO), 3, "100.0 KB free", "DSV4_MODELS")
    assert hub.fetched() == []


@pytest.mark.skipif(sys.platform != "linux", reason="root's right to write everywhere is dropped the Linux way")
def test_a_models_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    folder.chmod(0o555)
    as_anybody = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run([*as_anybody, sys.executable, "-m", "dsv4cli", "pull", REPO], capture_output=True, text=True,
                          env=environment(DSV4_MODELS=str(folder), HF_HUB_OFFLINE="0"), stdin=subprocess.DEVNULL)
    assert done.returncode == 3, done.stderr
    assert f"error: {folder / 'incoming'} cannot be written: Permission denied." in done.stderr
    assert "hint: Check the folder's permissions, or set DSV4_MODELS" in done.stderr
    assert hub.fetched() == []


@pytest.mark.parametrize("longer", [0, 8, -8])
def test_a_file_that_changes_on_the_hub_meanwhile(run_dsv4: Run, hub: Hub, published: Path, tmp_path: Path, longer: int) -> None:
    """The listing promises one file, the bytes come from another: as after a rewritten history."""
    other = tmp_path / SECOND
    data = (published / SECOND).read_bytes()
    other.write_bytes(data[:longer] if longer < 0 else data[:-1] + b"!" + b" " * longer)
    commit = hub.branches[REPO, "main"]

    def change() -> None:
        hub.repos[REPO][commit][SECOND] = stored(other)

    hub.faults = [Fault("model-00001", times=1, act=change)]
    failed(run_dsv4("pull", REPO, "--max-workers", "1"), 4, f"{SECOND} of {REPO} changed on the hub", "again")
    hub.repos[REPO][commit][SECOND] = stored(published / SECOND)
    before = len(hub.fetched())
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert "model-00001-of-00004.safetensors" not in hub.fetched()[before:]


def test_a_new_revision_during_the_pull_does_not_mix_in(run_dsv4: Run, hub: Hub, published: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(published, tmp_path / "newer")
    (newer / "README.md").write_text("another card\n")
    old = hub.branches[REPO, "main"]
    hub.faults = [Fault("config.json", times=1, act=lambda: hub.publish(REPO, newer) and None)]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert json.loads((installed() / store.MANIFEST).read_text())["revision"] == old
    assert hub.branches[REPO, "main"] != old


def test_what_another_revision_left_is_used_or_removed(run_dsv4: Run, hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.faults = [Fault("model-00003", status=403)]
    assert run_dsv4("pull", REPO, "--max-workers", "1").code == 4
    (published / "README.md").write_text("another card\n")
    hub.publish(REPO, published)
    hub.faults, before = [], len(hub.fetched())
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
    assert sorted(hub.fetched()[before:]) == ["README.md", *(f"model-0000{number}-of-00004.safetensors" for number in (3, 4))]


def test_offline_is_offline(run_dsv4: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    failed(run_dsv4("pull", REPO), 4, "HF_HUB_OFFLINE is set")
    assert hub.log == []


def test_an_answer_that_is_no_hubs(run_dsv4: Run, hub: Hub) -> None:
    hub.faults = [Fault("/api", status=200)]
    failed(run_dsv4("pull", REPO), 4, "Check HF_ENDPOINT")


@pytest.mark.parametrize("name", ["../escape.json", "a\\b.json", "/etc/x.json", "C:x.json"])
def test_a_repo_that_would_write_elsewhere(run_dsv4: Run, hub: Hub, name: str) -> None:
    files = hub.repos[REPO][hub.branches[REPO, "main"]]
    files[name] = files["config.json"]
    failed(run_dsv4("pull", REPO), 4, "impossible name", "Do not use this repo")


def test_a_published_file_that_is_no_safetensors(run_dsv4: Run, hub: Hub, published: Path) -> None:
    (published / SECOND).write_bytes(b"\xff" * 4000)
    hub.publish(REPO, published)
    failed(run_dsv4("pull", REPO), 4, f"{REPO}: ", SECOND, "as published")


def test_a_model_of_another_kind_is_refused_before_its_weights(run_dsv4: Run, hub: Hub, published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": ["Llama"]}))
    hub.publish(REPO, published)
    done = run_dsv4("pull", REPO)
    assert done.code == 1
    assert "llama" in done.err.lower()
    assert hub.fetched() == ["config.json"]


def test_two_pulls_of_one_model_do_not_meet(run_dsv4: Run, hub: Hub, published: Path) -> None:
    hub.faults = [Fault("safetensors", slow=0.05)]
    first = subprocess.Popen([sys.executable, "-m", "dsv4cli", "pull", REPO], env=environment(HF_HUB_OFFLINE="0"),
                             stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not list(incoming().glob("*.part")):
            assert first.poll() is None
            time.sleep(0.02)
        done = run_dsv4("pull", REPO)
        failed(done, 1, f"Another dsv4 is working on {REPO}", "Wait until it has ended")
    finally:
        hub.faults = []
        first.kill()
        first.communicate()
    assert run_dsv4("pull", REPO).code == 0  # a killed process holds nothing
    assert_same(published)


def test_a_folder_in_the_way_is_not_touched(run_dsv4: Run, hub: Hub, published: Path) -> None:
    installed().mkdir(parents=True)
    (installed() / "mine.txt").write_text("mine")
    done = run_dsv4("pull", REPO)
    assert (done.code, "is in the way" in done.err) == (1, True)
    assert (installed() / "mine.txt").read_text() == "mine"
    shutil.rmtree(installed())
    before = len(hub.fetched())
    assert run_dsv4("pull", REPO).code == 0
    assert hub.fetched()[before:] == []
    assert_same(published)


def test_a_hung_connection_is_given_up(run_dsv4: Run, hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "QUIET", 0.3)
    hub.faults = [Fault(SECOND, times=1, act=lambda: time.sleep(1.5))]
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)


def test_an_interrupted_pull_keeps_its_parts(run_dsv4: Run, hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault("safetensors", slow=0.02)]
    frames = iter(range(5))
    real = download.Download.run

    def interrupted(self: download.Download) -> Iterator[download.State]:
        for state in real(self):
            if len(self.state.current) and next(frames, None) is None:
                raise KeyboardInterrupt
            yield state

    with monkeypatch.context() as patched:
        patched.setattr(download.Download, "run", interrupted)
        assert run_dsv4("pull", REPO).code == 130
    kept = bytes_kept()
    assert kept > 0
    assert not (paths.models() / store.folder_name(REPO)).exists()
    hub.faults = []
    assert run_dsv4("pull", REPO).code == 0
    assert_same(published)
