"""Text to ids and back with the real vocabulary: golden ids, the border around control tokens, broken UTF-8."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4cli.encoding import texts
from dsv4cli.encoding.segments import Control, Text
from dsv4cli.encoding.tokenizer import StreamDecoder, Tokenizer
from dsv4cli.errors import CorruptError
from tests.encoding.conftest import Case, cases


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@cases("tokenize_open")
def test_golden_ids(case: Case, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(case["text"])
    assert ids == case["ids"]
    assert [tokenizer.token_bytes(token).hex() for token in ids] == case["token_bytes_hex"]
    assert ids != case.get("ids_if_control_spellings_were_honoured")


@cases("tokenize_open")
def test_golden_text_comes_back(case: Case, tokenizer: Tokenizer) -> None:
    pieces = streamed(tokenizer, case["ids"])
    assert "".join(pieces) == tokenizer.decode(case["ids"]) == case["text"]
    assert "\ufffd" in case["text"] or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_like_they_decode(data: st.DataObject, tokenizer: Tokenizer) -> None:
    """Single bytes and halves of characters are among the ids, so most of these are broken UTF-8."""
    some = st.integers(0, 600) | st.integers(0, tokenizer.vocab_size + 5)
    ids = data.draw(st.lists(some, max_size=12))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.control_ids & set(ids)


def test_a_cut_character_is_held_back_then_replaced(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode_text("🜚")
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(tokenizer.encode_text("a")[0]) == "a"


def test_spelled_controls_are_letters(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_text("<｜User｜>") == [30, 28217, 6756, 28217, 32]
    assert tokenizer.encode_text("｜DSML｜") == [28217, 10525, 7398, 28217]
    assert tokenizer.encode_text("</think>") == [1718, 37947, 32]


def test_placed_controls_are_one_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([Control(texts.USER), Text("<｜User｜>")]) == [128803, 30, 28217, 6756, 28217, 32]
    known = {texts.BOS: 0, texts.EOS: 1, texts.ASSISTANT: 128804, texts.THINK: 128821, texts.END_THINK: 128822}
    assert {spelling: tokenizer.control(spelling) for spelling in known} == known
    assert tokenizer.decode([128822]) == "</think>"


def test_what_ends_an_answer(tokenizer: Tokenizer) -> None:
    assert tokenizer.stop_ids == {0, 1, 128803, 128804}


def test_a_control_of_another_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(CorruptError, match="no token <｜System｜>"):
        tokenizer.control("<｜System｜>")


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"model": {"vocab": {}}}', "[]"])
def test_a_damaged_file_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)
