"""Settings: which source wins, where a value came from, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsv4cli import paths, settings
from dsv4cli.chat import turn
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import UsageError
from tests.support.fake_engine import FakeEngine


def write_config(text: str) -> Path:
    paths.config().parent.mkdir(parents=True, exist_ok=True)
    paths.config().write_text(text, encoding="utf-8")
    return paths.config()


def test_every_source_overrules_the_ones_before(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings.load()
    assert (chosen["think"], chosen.origin("think")) == ("high", "default")
    file = write_config('think = "low"\ntemp = 0.25\n')
    assert (settings.load()["think"], settings.load().origin("think")) == ("low", f"think in {file}")
    monkeypatch.setenv("DSV4_THINK", "max")
    assert (settings.load()["think"], settings.load().origin("think")) == ("max", "DSV4_THINK")
    flagged = settings.load({"think": "off", "temp": None, "stop": []})
    assert (flagged["think"], flagged.origin("think")) == ("off", "--think")
    assert (flagged["temp"], flagged["stop"]) == (0.25, None)


@pytest.mark.parametrize(("name", "text", "value"), [
    ("temp", "0", 0.0), ("seed", "9223372036854775807", 2**63 - 1), ("stats", "on", True), ("stats", "0", False),
    ("stop", "END", ("END",)), ("system", "", ""), ("max_tokens", "1", 1)])
def test_texts_become_values(name: str, text: str, value: object) -> None:
    parsed = settings.TABLE[name].parse(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("name", "raw"), [
    ("temp", "warm"), ("temp", "nan"), ("temp", "inf"), ("temp", -1), ("temp", True), ("top_k", "1.5"), ("top_k", 2.5),
    ("seed", -1), ("seed", 2**63), ("think", "hard"), ("think", 3), ("stats", "perhaps"), ("max_tokens", 0), ("stop", 5),
    ("system", ["a"]), ("numerics", "exact"), ("ctx", "")])
def test_impossible_values_are_refused_with_their_source(name: str, raw: object) -> None:
    with pytest.raises(UsageError, match=r"^DSV4_X is .*, but it must be "):
        settings.TABLE[name].parse(raw, "DSV4_X")


@pytest.mark.parametrize(("text", "sentence"), [
    ("think = ", "cannot be read"), ("thnik = 'off'", "no setting thnik"), ("think = 'hard'", "must be off, low, high or max"),
    ("[table]\nx = 1", "no setting table"), ("think = 1", "must be off, low, high or max"), ("temp = true", "must be a number")])
def test_a_bad_settings_file_is_named(text: str, sentence: str) -> None:
    file = write_config(text)
    with pytest.raises(UsageError, match=sentence) as failure:
        settings.load()
    assert str(file) in failure.value.message


def test_a_settings_file_that_is_not_utf8_is_named() -> None:
    write_config("")
    paths.config().write_bytes(b"system = '\xff'")
    with pytest.raises(UsageError, match="cannot be read"):
        settings.load()


def test_an_unknown_key_gets_the_nearest_name() -> None:
    write_config("temperature = 1")
    with pytest.raises(UsageError) as failure:
        settings.load()
    assert failure.value.hint == "Did you mean temp?" or "temp" in failure.value.hint


def test_chosen_leaves_out_what_nobody_chose() -> None:
    chosen = settings.load({"ctx": 5})
    assert chosen.chosen("ctx", "device", "threads") == {"ctx": 5}


def test_changing_makes_another() -> None:
    before = settings.load()
    after = before.changed("temp", "0.5", "/set temp")
    assert (before["temp"], after["temp"], after.origin("temp")) == (None, 0.5, "/set temp")
    assert after.without("temp")["temp"] is None
    with pytest.raises(UsageError, match="no setting tmep"):
        before.changed("tmep", "1", "/set")


def test_the_sampler_takes_every_sampling_setting() -> None:
    chosen = settings.load({"temp": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 7, "repeat_penalty": 1.1, "seed": 3})
    made = turn.sampling(FakeEngine(), chosen)
    assert made == Sampling(temperature=0.5, top_p=0.9, min_p=0.1, top_k=7, repetition_penalty=1.1, seed=3)
    assert turn.sampling(FakeEngine(), settings.load()) == Sampling()


def test_the_models_own_sampling_holds_where_nobody_chose() -> None:
    engine = FakeEngine(sampling=Sampling(temperature=0.3, top_p=0.9))
    assert turn.sampling(engine, settings.load({"top_p": 0.5})) == Sampling(temperature=0.3, top_p=0.5)
    assert turn.sampling(engine, settings.load({"seed": 3}), attempt=2).seed == 5


def test_no_variable_of_a_setting_is_also_the_variable_of_a_folder() -> None:
    folders = set(re.findall(r"DSV4_[A-Z]+", paths.__doc__ or ""))
    assert folders == {"DSV4_HOME", "DSV4_MODELS", "DSV4_CACHE", "DSV4_CONFIG", "DSV4_SESSIONS"}
    assert not folders & {f"DSV4_{name.upper()}" for name in settings.TABLE}
