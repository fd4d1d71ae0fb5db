"""The tokenizer.json that a GGUF's tokenizer keys stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTROL, USER_DEFINED = 3, 4

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


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dictionary of a tokenizer.json, or None where the file has no byte-level BPE tokenizer."""
    if metadata.get("tokenizer.ggml.model") != "gpt2" or "tokenizer.ggml.tokens" not in metadata:
        return None
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": kind == USER_DEFINED, "special": kind == CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    vocabulary = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind not in (CONTROL, USER_DEFINED)
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in SPLITS
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
            "merges": [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", [])],
        },
    }  # fmt: skip
