"""The real model under the engine, on a small random checkpoint with every kind of layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4_kernels import backends
from dsv4_kernels.native import library
from dsv4_kernels.native.build import BuildError
from dsv4_quant.errors import QuantError
from dsv4cli import Engine
from dsv4cli.engine import Sampling, evaluate, opening
from dsv4cli.engine.memory import DEFAULT_CONTEXT
from dsv4cli.errors import CapacityError, CorruptError, UsageError
from dsv4cli.model.state import State
from tests.engine.mock_model import byte_tokenizer_json
from tests.support.synth import Checkpoint, Shape
from tests.support.tolerance import CHUNKS, assert_close

IDS = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Checkpoint(Shape(), seed=3).write(tmp_path_factory.mktemp("models") / "random")
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer_json()))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.open(folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Engine:
    return Engine.open(folder, numerics="plain")


def test_what_an_engine_says_of_itself(engine: Engine, folder: Path) -> None:
    assert engine.name == folder.name
    assert (engine.release, engine.numerics, engine.ctx) == ("april", "official", DEFAULT_CONTEXT)
    assert engine.plan.weights == sum(tensor.nbytes for tensor in Checkpoint(Shape(), seed=3).official.values())
    assert engine.plan.expanded == pytest.approx(engine.weight_bytes, rel=1e-3)  # expanded, and the plan knew
    assert engine.plan.state == State.bytes_for(engine.config, DEFAULT_CONTEXT, "official")


@pytest.mark.parametrize("leave", [1, 3, 127, 128, 129, 200, 249])
def test_sync_after_a_divergence_equals_a_fresh_session(engine: Engine, plain: Engine, leave: int) -> None:
    """Snapshots at the borders of the window and of the groups. Bitwise where the prompt was cut in the same places;
    otherwise float32 sums differ in their order, which the roundings of `official` would make larger."""
    branch = [*IDS[:leave], *IDS[30:40]]
    for each in (engine, plain):
        session = each.session()
        session.sync(IDS[:250], marks=[leave])
        for token in IDS[:5]:
            session.step(token)
        logits = session.sync(branch)
        assert session.reused == leave
        assert torch.equal(logits, each.session().sync(branch, marks=[leave]))
    assert_close(logits, plain.session().sync(branch), CHUNKS)


def test_going_back_and_on_again_is_bitwise(engine: Engine) -> None:
    session = engine.session()
    session.sync(IDS[:140])
    first = [session.step(token) for token in IDS[140:150]]
    session.sync(IDS[:140])
    assert all(torch.equal(session.step(token), old) for token, old in zip(IDS[140:150], first, strict=True))


def test_a_saved_session_goes_on_bitwise_and_only_with_its_model(engine: Engine, plain: Engine, tmp_path: Path) -> None:
    session = engine.session()
    session.sync(IDS[:150])
    session.save(tmp_path / "talk")
    other = engine.session()
    other.load(tmp_path / "talk")
    assert torch.equal(other.logits, session.logits)
    assert all(torch.equal(other.step(token), session.step(token)) for token in IDS[150:160])
    with pytest.raises(UsageError, match="numerics"):
        plain.session().load(tmp_path / "talk")


def test_logits_to_a_file_are_the_models(plain: Engine, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    evaluate.write_logits(plain, IDS[:70], tmp_path / "out.npy", chunk=32, progress=lambda *at: seen.append(at))
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    whole = plain.model.forward(torch.tensor(IDS[:70]), plain.model.new_state(70), logits="all")
    assert_close(torch.from_numpy(found), whole, CHUNKS)
    assert seen == [(32, 70), (64, 70), (70, 70)]
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"]


def test_logits_of_bad_ids_write_nothing(engine: Engine, tmp_path: Path) -> None:
    for ids, said in (([], "empty"), ([9999], "9999 is outside"), ([0] * (engine.ctx + 1), f"context of {engine.ctx}")):
        with pytest.raises(UsageError, match=said):
            evaluate.write_logits(engine, ids, tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 20), (256, 255)])
def test_perplexity_scores_each_token_once(plain: Engine, window: int, stride: int | None) -> None:
    """Spelled out: for every token, the first window that holds it, computed on its own from BOS."""
    text = IDS[:150]
    losses, scored = [], 0
    for start in range(0, len(text), stride or window - 1):
        piece = text[start:start + window - 1]
        rows = plain.model.forward(torch.tensor([0, *piece[:-1]]), plain.model.new_state(window), logits="all").double()
        for place in range(max(0, scored - start), len(piece)):
            losses.append(-torch.log_softmax(rows[place], -1)[piece[place]].item())
        scored = max(scored, start + len(piece))
    found = evaluate.perplexity(plain, text, window=window, stride=stride, chunk=50)
    assert found.tokens == len(losses) == len(text)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.error == pytest.approx(np.std(losses, ddof=1) / len(losses) ** 0.5, rel=1e-3)
    assert found.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)


@pytest.mark.parametrize(("window", "stride"), [(1, None), (64, 64), (64, 0), (DEFAULT_CONTEXT + 1, None)])
def test_perplexity_refuses_windows_that_cannot_be(engine: Engine, window: int, stride: int | None) -> None:
    with pytest.raises(UsageError, match=f"Windows of {window}"):
        evaluate.perplexity(engine, IDS, window=window, stride=stride)


def test_a_model_that_does_not_fit_is_refused_before_it_is_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "available_memory", lambda: 5_000_000)
    monkeypatch.setattr(opening, "resident_bytes", lambda: 0)
    monkeypatch.setattr(Engine, "__init__", None)  # nothing may come so far
    with pytest.raises(CapacityError, match=r"random needs .* MB of memory .* only 5\.0 MB are available"):
        Engine.open(folder)


def test_files_that_may_not_be_mapped_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "address_space", lambda: 1_000_000)
    with pytest.raises(CapacityError, match=r"files of random are .* MB, .* may map only 1\.0 MB more"):
        Engine.open(folder)


@pytest.mark.parametrize(("options", "said"), [
    ({"device": "tpu"}, "no device 'tpu'"), ({"numerics": "fast"}, "fast"),
    ({"threads": 0}, "0 threads"), ({"ctx": 0}, "0 tokens"), ({"ctx": 2_000_000}, "2000000 .* 1048576"),
    ({"release": "may"}, "may"),
])
def test_bad_options_are_refused(folder: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Engine.open(folder, **options)  # type: ignore[arg-type]


def test_threads_go_to_our_own_kernels(folder: Path) -> None:
    """A very small model gets one thread unless told otherwise: the others would only wait for each other."""
    before = torch.get_num_threads()
    try:
        Engine.open(folder, threads=3)
        assert (library.threads(), torch.get_num_threads()) == (3, 1)  # torch's own would be in the way
        Engine.open(folder)
        assert (library.threads(), torch.get_num_threads()) == (1, 1)
    finally:
        torch.set_num_threads(before)


def test_threads_go_to_torch_without_our_own_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "cpu_trouble", lambda: BuildError("There is no compiler."))
    before = torch.get_num_threads()
    try:
        Engine.open(folder, threads=3)
        assert torch.get_num_threads() == 3
        Engine.open(folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_release_is_read_from_the_models_own_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = folder / "README.md"
    readme.write_text("# DeepSeek-V4-Flash-0731\n")
    try:
        assert Engine.open(folder).release == "0731"
        assert Engine.open(folder, release="april").release == "april"
        readme.write_text("# DeepSeek-V4-Flash\nThe predecessor of what came on 0731.")
        assert Engine.open(folder).release == "april"
    finally:
        readme.unlink()


@pytest.mark.parametrize(("said", "expected"), [
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.95, "eos_token_id": 1}, Sampling(temperature=0.7, top_p=0.95)),
    ({"do_sample": False, "temperature": 0.7}, Sampling(temperature=0)),
    ({"top_k": None}, Sampling()),
])
def test_the_authors_recommend_the_sampling(folder: Path, said: dict[str, object], expected: Sampling) -> None:
    config = folder / "generation_config.json"
    config.write_text(json.dumps(said))
    try:
        assert Engine.open(folder).sampling == expected
    finally:
        config.unlink()


@pytest.mark.parametrize("broken", ["{", "[]", '{"temperature": "hot"}', '{"top_p": 7}'])
def test_a_broken_recommendation_is_named(folder: Path, broken: str) -> None:
    config = folder / "generation_config.json"
    config.write_text(broken)
    try:
        with pytest.raises(CorruptError, match=r"generation_config\.json"):
            Engine.open(folder)
    finally:
        config.unlink()


def test_a_checkpoint_without_its_tokenizer(folder: Path) -> None:
    aside = (folder / "tokenizer.json").rename(folder / "aside.json")
    try:
        with pytest.raises((CorruptError, QuantError), match="tokenizer"):
            Engine.open(folder)
    finally:
        aside.rename(folder / "tokenizer.json")
