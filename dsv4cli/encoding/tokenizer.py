"""Text to ids and back, with the border that keeps control tokens out of text (spec/encoding.md section 15).

One `tokenizer.json` is read twice: as it is, to know the control tokens by spelling; and without its added-token table,
to encode what people wrote. `<｜User｜>` inside a message becomes five ordinary tokens, never the one control id.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import BPE

from dsv4cli.encoding import texts
from dsv4cli.encoding.segments import Control, Segment
from dsv4cli.errors import CorruptError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _encodable(text: str) -> str:
    """Text that UTF-8 can hold. JSON can spell half a surrogate pair, and undecodable input is passed on as such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


ALPHABET = _byte_alphabet()
BPE_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
               "ignore_merges")


def _without_added(data: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that knows no added tokens. Its vocabulary is handed over as it is: as JSON it takes three times as long."""
    model = data["model"]
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    bare = data | {"added_tokens": [], "model": model | {"vocab": {}, "merges": []}}
    made = tokenizers.Tokenizer.from_str(json.dumps(bare))
    options = {name: model[name] for name in BPE_OPTIONS if model.get(name) is not None}
    made.model = BPE(vocab=model["vocab"], merges=merges, **options)
    return made


class Tokenizer:
    """A byte-level BPE tokenizer with the V4 control tokens."""

    def __init__(self, data: dict[str, Any], origin: str = "tokenizer.json") -> None:
        self.origin = origin
        try:
            added = data.get("added_tokens", [])
            self._controls: dict[str, int] = {token["content"]: token["id"] for token in added}
            self._base: dict[str, int] = data["model"]["vocab"]
            self._text = _without_added(data)
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise CorruptError(f"{origin} is not a tokenizer: {error}.", "Fetch the file again.") from error
        self._spelling = {i: spelling for spelling, i in self._controls.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError) as error:
            raise CorruptError(f"{path} cannot be read: {error}.", "Fetch the file again.") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tokenizer:
        return cls(data)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(max(self._base.values()), max(self._controls.values(), default=0)) + 1

    @cached_property
    def _pieces(self) -> dict[int, str]:
        return {i: piece for piece, i in self._base.items()}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: EOS, and defensively whatever would open the next turn."""
        ends = (texts.EOS, texts.BOS, texts.USER, texts.ASSISTANT)
        return frozenset(self._controls[spelling] for spelling in ends if spelling in self._controls)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self._controls.values())

    def control(self, spelling: str) -> int:
        """The id of a control token. Raises CorruptError when this tokenizer has no such token."""
        try:
            return self._controls[spelling]
        except KeyError:
            raise CorruptError(
                f"{self.origin} has no token {spelling}.", "Use the tokenizer.json of a DeepSeek-V4 checkpoint."
            ) from None

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a control id. Half a surrogate pair is U+FFFD."""
        ids: list[int] = self._text.encode(_encodable(text), add_special_tokens=False).ids
        return ids

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a rendered prompt (neighbouring texts must already be one segment, as `Rendered` keeps them)."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Control):
                ids.append(self.control(segment.text))
            else:
                ids += self.encode_text(segment.text)
        return ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; a control token's spelling. Unknown ids are empty."""
        if token in self._spelling:
            return self._spelling[token].encode()
        piece = self._pieces.get(token, "")
        return bytes(map(ALPHABET.__getitem__, piece)) if ALPHABET.keys() >= set(piece) else b""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens spelled out; broken UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class StreamDecoder:
    """Turns ids into text as they come, holding back the start of a character whose bytes are not complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What was held back, as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
