"""The tokenizer.json that a GGUF's tokenizer keys stand for.

A GGUF lists every token with a kind: ordinary pieces in GPT-2's byte alphabet, control tokens and user-defined ones in plain
spelling, and unused numbers that pad the vocabulary. The pre-tokenizer is only named, and by different names (llama.cpp's
converter takes DeepSeek-V4's for `joyai-llm`), so it is always the one that all DeepSeek-V4 models have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4_quant.errors import CorruptFile
from dsv4_quant.files.info import DAMAGED

ORDINARY, CONTROL, USER_DEFINED = 1, 3, 4

# DeepSeek-V4's pre-tokenizer (spec/encoding.md section 15): digits by threes, runs of Han and kana, then words and marks.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^"""
    "\r\n"
    r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["""
    "\r\n"
    r"""]*|\s*["""
    "\r\n"
    r"""]+|\s+(?!\S)|\s+""",
)


def tokenizer_json(metadata: Mapping[str, Any], origin: str) -> dict[str, Any] | None:
    """The dictionary of a tokenizer.json, or None where the file has no byte-level BPE tokenizer.

    Added tokens are in the vocabulary too, so that each keeps its id. Raises CorruptFile for keys of the wrong type.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2" or "tokenizer.ggml.tokens" not in metadata:
        return None
    tokens = _texts(metadata["tokenizer.ggml.tokens"], "tokenizer.ggml.tokens", origin)
    merges = _texts(metadata.get("tokenizer.ggml.merges", []), "tokenizer.ggml.merges", origin)
    kinds = metadata.get("tokenizer.ggml.token_type", [ORDINARY] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CorruptFile(f"{origin}: tokenizer.ggml.token_type does not fit {len(tokens)} tokens.", DAMAGED)
    pairs = [merge.split(" ", 1) for merge in merges]
    odd = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if odd is not None:
        raise CorruptFile(f"{origin}: the merge {odd!r} joins nothing.", DAMAGED)
    return _document(tokens, kinds, pairs)


def _document(tokens: list[str], kinds: list[Any], merges: list[list[str]]) -> dict[str, Any]:
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": kind == USER_DEFINED, "special": kind == CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    splits = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in SPLITS
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "merges": merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
        },
    }  # fmt: skip


def _texts(value: Any, key: str, origin: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CorruptFile(f"{origin}: {key} is no list of texts.", DAMAGED)
    return value
