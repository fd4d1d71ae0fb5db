"""What a model's name means, and where it is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dsv4cli import paths
from dsv4cli.errors import Dsv4Error, UsageError
from dsv4cli.registry import catalog, store

FLASH = "deepseek-ai/DeepSeek-V4-Flash"
PINNED = "60d8d70770c6776ff598c94bb586a859a38244f1"


def checkpoint(folder: Path, shards: int = 1, promised: int | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for number in range(1, shards + 1):
        (folder / f"model-{number:05}-of-{promised or shards:05}.safetensors").write_bytes(b"12345678")
    return folder


def in_hub(repo: str, commit: str, **options: int) -> Path:
    return checkpoint(paths.hub_cache() / f"models--{repo.replace('/', '--')}" / "snapshots" / commit, **options)


def in_models(name: str, **fields: str) -> Path:
    folder = checkpoint(paths.models() / name.replace("@", "-"))
    (folder / "manifest.json").write_text(json.dumps({"name": name, **fields}))
    return folder


@pytest.fixture(autouse=True)
def without_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paths, "bundled", lambda name: tmp_path / "bundled" / name)


def test_published_models_and_their_releases() -> None:
    known = catalog.catalog()
    assert list(known) == [
        "tiny", "flash", "flash@0731", "flash-dspark", "flash-base", "pro", "pro@0813", "pro-dspark", "pro-base"]
    assert {name for name, entry in known.items() if entry.release == "0731"} == {"flash@0731", "pro@0813"}
    assert (known["flash"].tensors, known["flash"].nbytes, known["flash"].shards) == (69187, 159609485896, 46)
    assert (known["pro"].tensors, known["pro"].nbytes, known["pro"].shards) == (145116, 864704792696, 64)
    assert all(entry.repo.startswith("deepseek-ai/DeepSeek-V4-") for entry in known.values() if entry.repo)
    assert all(len(entry.revision) == 40 for entry in known.values() if entry.revision)
    assert all(entry.license == "MIT" for entry in known.values())


def test_a_known_model_that_is_not_here_says_where_it_was_looked_for() -> None:
    entry = catalog.resolve("Flash")
    assert (entry.name, entry.path, entry.repo) == ("flash", None, FLASH)
    with pytest.raises(Dsv4Error) as failure:
        entry.located()
    assert failure.value.exit_code == 1
    assert str(paths.models()) in failure.value.message
    assert "46 shards hold 160 GB" in failure.value.hint
    assert "dsv4 pull flash" in failure.value.hint


@pytest.mark.parametrize(("name", "nearest"), [("flsh", "flash"), ("flash@0713", "flash@0731"), ("tyni", "tiny")])
def test_a_misspelt_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no model called {name}") as failure:
        catalog.resolve(name)
    assert nearest in failure.value.hint


@pytest.mark.parametrize("name", ["./none", "/none/here", "~/none", "none.gguf", "a/b/c", "none/"])
def test_a_path_that_is_not_there_is_called_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="There is no folder or file"):
        catalog.resolve(name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", " "])
def test_impossible_names_are_refused_politely(name: str) -> None:
    with pytest.raises(UsageError):
        catalog.resolve(name)


def test_a_folder_and_a_gguf_are_models_by_path(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    assert (catalog.resolve(str(folder)).path, catalog.resolve(str(folder)).name) == (folder, "mine")
    assert (catalog.resolve(str(gguf)).path, catalog.resolve(str(gguf)).quant) == (gguf, "gguf")


def test_a_folder_without_config_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match=r"config\.json|neither"):
            catalog.resolve(str(path))


def test_a_published_config_is_recognised_whatever_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "renamed")
    digest = hashlib.sha256(b"{}").hexdigest()
    known = {**catalog.catalog(), "pro@0813": catalog.Entry("pro@0813", release="0731", config_sha256=digest)}
    monkeypatch.setattr(catalog, "catalog", lambda: known)
    entry = catalog.resolve(str(folder))
    assert (entry.name, entry.release, entry.path) == ("pro@0813", "0731", folder)


def test_the_name_of_the_catalog_wins_over_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "flash")
    monkeypatch.chdir(tmp_path)
    assert catalog.resolve("flash").path is None
    assert catalog.resolve("./flash").path == tmp_path / "flash"


def test_the_hub_cache_is_found_by_alias_and_by_repo() -> None:
    older, newer = in_hub(FLASH, "a" * 40), in_hub(FLASH, "b" * 40)
    refs = newer.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    assert catalog.resolve(FLASH).path == newer
    assert catalog.resolve("flash").revision == "b" * 40
    pinned = in_hub(FLASH, PINNED)
    assert catalog.resolve("flash").path == pinned
    assert {older, newer, pinned} > {catalog.resolve("flash").path}


def test_a_snapshot_that_lacks_shards_is_not_a_model() -> None:
    in_hub(FLASH, PINNED, shards=2, promised=46)
    assert catalog.resolve("flash").path is None


def test_an_unknown_repo_in_the_cache_is_a_model_too() -> None:
    folder = in_hub("somebody/V4-Mine", "c" * 40)
    assert catalog.resolve("somebody/V4-Mine").path == folder
    assert catalog.resolve("somebody/else").path is None


def test_a_repo_of_ggufs_gives_its_only_model_or_asks_which() -> None:
    snapshot = paths.hub_cache() / "models--a--b" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    for part in (1, 2):
        (snapshot / f"q4-{part:05}-of-00002.gguf").write_bytes(b"GGUF")
    assert catalog.resolve("a/b").path == snapshot / "q4-00001-of-00002.gguf"
    assert catalog.resolve("a/b").revision == "d" * 40
    (snapshot / "q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"2 models: q4-00001-of-00002\.gguf, q8\.gguf"):
        catalog.resolve("a/b")


def test_a_manifest_makes_a_folder_a_model() -> None:
    folder = in_models("flash", revision="e" * 40)
    unfinished = checkpoint(paths.models() / "pro")
    assert catalog.resolve("flash").path == folder
    assert catalog.resolve("flash").revision == "e" * 40
    assert catalog.resolve("pro").path is None
    (unfinished / "manifest.json").write_text("{ cut o")
    assert catalog.resolve("pro").path is None


def test_installed_lists_each_model_once() -> None:
    in_models("flash")
    mine = in_models("my-own", release="0731", license="MIT")
    hub = in_hub("deepseek-ai/DeepSeek-V4-Pro", "f" * 40)
    found = {entry.name: entry for entry in catalog.installed()}
    assert list(found) == ["flash", "pro", "my-own"]
    assert (found["my-own"].path, found["my-own"].release, found["pro"].path) == (mine, "0731", hub)


@pytest.mark.parametrize(("word", "is_model"), [
    ("tiny", True), ("FLASH@0731", True), ("hello", False), ("flsh", False), ("and/or", False), ("What is 1/2?", False),
    ("x" * 5000, False), ("", False)])
def test_words_that_surely_mean_a_model(word: str, is_model: bool) -> None:
    assert catalog.names_model(word) is is_model


def test_paths_and_cached_repos_surely_mean_a_model(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine")
    in_hub("a/b", "a" * 40)
    assert catalog.names_model(str(folder))
    assert catalog.names_model("a/b")
    assert not catalog.names_model(str(tmp_path))


def test_size_counts_all_parts(tmp_path: Path) -> None:
    assert store.size(checkpoint(tmp_path / "m", shards=3)) == 24
    for part in (1, 2):
        (tmp_path / f"q-{part:05}-of-00002.gguf").write_bytes(b"1234")
    (tmp_path / "q-other.gguf").write_bytes(b"1234")
    assert store.size(tmp_path / "q-00001-of-00002.gguf") == 8
    assert store.size(tmp_path / "q-other.gguf") == 4


def test_a_gguf_of_a_repo_and_a_revision_can_be_named() -> None:
    entry = catalog.resolve("a/b@v2:Q4_K_M")
    assert (entry.repo, entry.revision, entry.pick, entry.asked, entry.path) == ("a/b", "v2", "Q4_K_M", True, None)
    assert catalog.resolve("a/b:x-Q8_0.gguf").pick == "x-Q8_0.gguf"
    in_hub("a/b", "c" * 40)
    assert catalog.resolve("a/b@" + "d" * 40).path is None  # another revision will not do
    assert catalog.resolve("a/b@" + "c" * 40).path is not None


@pytest.mark.parametrize(("pick", "found"), [
    ("q4_k_m", ["m-Q4_K_M.gguf"]), ("Q4_K", ["m-Q4_K_M.gguf"]), ("q4", ["m-Q4_K_M.gguf"]), ("4", []),
    ("q8_0", ["m-Q8_0-00001-of-00003.gguf"]),
    ("m-Q8_0.gguf", ["m-Q8_0-00001-of-00003.gguf"]),
    ("m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]), ("m", ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00003.gguf"])])
def test_ggufs_are_found_by_file_and_by_quantisation(pick: str, found: list[str]) -> None:
    names = ["m-Q4_K_M.gguf", *(f"m-Q8_0-0000{part}-of-00003.gguf" for part in (1, 2, 3)), "config.json"]
    assert store.ggufs(names, pick) == found
    assert store.ggufs([*names, "m-Q4_K.gguf"], "q4_k") == ["m-Q4_K.gguf"]
    assert store.parts_of("m-Q8_0-00001-of-00003.gguf", names) == names[1:4]
    assert store.parts_of("m-Q4_K_M.gguf", names) == names[:1]
