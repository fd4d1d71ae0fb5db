"""Train the byte-level BPE of `tiny` on the generator's own text and write tokenizer.json.

    python -m tools.tiny.tokenizer OUT_DIR

Pre-tokenizer, decoder and the spelling and flags of the control tokens are those of the official file
(spec/encoding.md section 15); only the vocabulary is small. No merge joins digits: a number is one token a digit.
The names and words of the small world get a token of their own also without a space before them, so that copying
a word into JSON or to the start of an answer is one step, as it is inside a sentence.
"""

# ruff: noqa: SIM905 (long word lists read better as text)

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4cli.encoding import template
from tools.tiny.calls import LANGUAGES
from tools.tiny.data import Mixture, draw_row
from tools.tiny.shape import VOCAB_SIZE
from tools.tiny.turns import World
from tools.tiny.world import NAMES, WORDS

BASE = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]  # ids 0, 1, 2
# Neither special nor taken as they are, like User and Assistant in the official file.
CHAT = (
    "<｜fim▁hole｜> <｜fim▁begin｜> <｜fim▁end｜> <｜User｜> <｜Assistant｜> <|EOT|> <｜tool▁calls▁begin｜> "
    "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
    "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> "
    "<｜tool▁output▁end｜> <｜tool▁sep｜> <｜begin▁of▁repo▁name｜> <｜end▁of▁repo▁name｜> <｜begin▁of▁file▁name｜> "
    "<｜end▁of▁file▁name｜> <｜begin▁of▁file｜> <｜end▁of▁file｜> <think> </think> <｜place▁holder▁for▁copy｜> "
    "<｜place▁holder▁for▁pointer▁replace｜> ｜DSML｜ <｜begin▁sys｜> <｜end▁sys｜> <｜latest_reminder｜> "
    "<｜action｜> <｜query｜> <｜authority｜> <｜domain｜> <｜task｜> <｜political｜> <｜entity｜> "
    "<｜title｜> <｜safety｜> <｜answer｜> "
    "<｜search｜> <dsml: </dsml: <｜search▁begin｜> <｜search▁end｜> <｜extracted_url｜> <｜read_url｜>"
).split()
SPECIAL = (
    "<｜end_of_query｜> <｜rl_image_pad｜> <｜rl_image_start｜> <｜/polygon｜> <｜polygon｜> <｜/point｜> <｜point｜> <｜/box｜> "
    "<｜box｜> <｜/ref｜> <｜ref｜> <｜image｜>"
).split()
TABLE = "<｜image2｜> <｜/table>｜ <｜table｜> <｜/td｜> <｜td｜> <｜/tr｜> <｜tr｜>".split()
LEARNT = 1471  # ids found by BPE; the words follow, then the control tokens
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": BASE[0],
    "clean_up_tokenization_spaces": False,
    "eos_token": BASE[1],
    "legacy": True,
    "model_max_length": 65536,
    "pad_token": BASE[1],
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": None,
}


def corpus(seed: int, rows: int) -> Iterator[str]:
    """Rendered conversations, control tokens cut out and every number shortened to one digit."""
    world, mix = World(Random(seed)), Mixture(reach=300)
    for _ in range(rows):
        row = draw_row(world, mix)
        thinking, effort = template.think_level(row.think, "april")
        rendered = template.render(
            row.messages(), thinking=thinking, effort=effort, release="april", tools=row.tools or None
        )
        text = re.sub(r"<｜[^｜]*｜>|</?think>|｜DSML｜", "\n\n\n", str(rendered))
        yield from re.sub(r"\d+", "7", text).split("\n\n\n")


def train(seed: int = 0, rows: int = 6000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(s), "isolated") for s in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNT,
        special_tokens=BASE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, rows), trainer)
    return finish(tokenizer)


def finish(tokenizer: Tokenizer) -> Tokenizer:
    """Append the words, then the control tokens."""
    tokenizer = with_words(tokenizer, [*NAMES, *WORDS, *LANGUAGES])
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=False) for t in CHAT])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in TABLE])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def with_words(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    """Append merges, the last in rank, that make one token of each word where no space stands before it.

    Stops when only the control tokens still fit.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    room = VOCAB_SIZE - len(CHAT) - len(SPECIAL) - len(TABLE)
    for word in words:
        pieces = tokenizer.encode(word, add_special_tokens=False).tokens
        whole = pieces[0]
        for piece in pieces[1:]:
            if whole + piece not in vocab and len(vocab) < room:
                merges.append([whole, piece])
                vocab[whole + piece] = len(vocab)
            if whole + piece not in vocab:
                break
            whole += piece
    return Tokenizer.from_str(json.dumps(content))


def write(folder: Path, tokenizer: Tokenizer) -> None:
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"The vocabulary has {tokenizer.get_vocab_size()} ids, but the shape says {VOCAB_SIZE}.")
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(CONFIG, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]), train())
