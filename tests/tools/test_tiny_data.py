"""The generator of `tiny`: its split, its rows, its tokenizer, and the judge of the answers."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

import dsv4cli
from dsv4cli.encoding.tokenizer import Tokenizer
from tools.tiny.data import LEVELS, Mixture, draw_row
from tools.tiny.exam import MAIN, REST, questions
from tools.tiny.rows import Batcher, Encoder
from tools.tiny.skills import addition, total
from tools.tiny.turns import World
from tools.tiny.world import held_out

ASSET = Path(dsv4cli.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer.from_file(ASSET / "tokenizer.json"))


def test_the_same_seed_gives_the_same_rows() -> None:
    first, second = (World(Random(4)), World(Random(4)))
    for _ in range(30):
        assert draw_row(first, Mixture()).messages() == draw_row(second, Mixture()).messages()


def test_sums_for_evaluation_never_occur_in_training() -> None:
    def pairs(evaluation: bool) -> set[tuple[int, ...]]:
        world = World(Random(1), evaluation=evaluation)
        found = [tuple(sorted(map(int, re.findall(r"\d+", total(world).answer)[:2]))) for _ in range(400)]
        return {pair for pair in found if max(pair) > 9}  # sums of digits have to be learnt, all of them

    assert not pairs(True) & pairs(False)


def test_one_content_in_eight_is_held_out() -> None:
    share = sum(held_out(f"content {i}") for i in range(4000)) / 4000
    assert 0.1 < share < 0.15


def test_a_sum_is_worked_out_from_the_right_with_its_carries() -> None:
    assert addition(47, 38) == "7+8=15, carry 1. 4+3+1=8."
    assert addition(95, 7) == "5+7=12, carry 1. 9+1=10."
    assert addition(120, 30) == "0+0=0. 2+3=5. 1=1."


def test_a_number_costs_one_token_a_digit(encoder: Encoder) -> None:
    for text in ("482", "1234567", "12+345"):
        assert len(encoder.tokenizer.encode_text(text)) == len(text)


def test_what_is_learnt_is_what_the_assistant_says(encoder: Encoder) -> None:
    world = World(Random(9))
    for _ in range(60):
        row = draw_row(world, Mixture(reach=80))
        encoded = encoder.encode(row)
        assert encoded.spans[-1].last == len(encoded.ids) - 1
        message = row.messages()[-1]
        said = encoder.tokenizer.decode(encoded.ids[encoded.spans[-1].first :])
        reasoning = message.get("reasoning_content")
        assert said.startswith(message["content"] if reasoning is None else reasoning + "</think>" + message["content"])
        assert encoded.ids[: encoded.spans[-1].first] == encoder.prompt(row)


def test_batches_are_padded_and_padding_is_not_learnt(encoder: Encoder) -> None:
    batch = Batcher(encoder, World(Random(2)), tokens=512).next(Mixture(reach=60))
    assert batch.ids.shape == batch.weights.shape
    assert batch.ids.shape[1] % 64 == 0
    for row, spans in enumerate(batch.spans):
        assert float(batch.weights[row, spans[-1].last + 1 :].sum()) == 0.0


@pytest.mark.parametrize("skill", [*MAIN, *REST])
def test_the_judge_takes_the_right_answer_and_no_other(skill: str) -> None:
    for question in questions(skill, "high", 3):
        turn = question.row.turns[-1]
        calls = question.messages and [
            {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}
            for c in question.row.messages()[-1].get("tool_calls", [])
        ]
        assert question.right(turn.answer, calls)
        assert not question.right("Something else, 7.", [])


def test_a_far_number_is_far(encoder: Encoder) -> None:
    question = questions("hidden 2000", "high", 1)[0]
    ids = encoder.prompt(question.row)
    text = encoder.tokenizer.decode(ids)
    wanted = question.row.turns[-1].answer
    behind = encoder.tokenizer.encode_text(text[text.index(wanted) + len(wanted) :])
    assert 2000 <= len(behind) <= 2700


def test_the_levels_think_differently() -> None:
    for skill in MAIN:
        lengths = {}
        for think in LEVELS:
            message = questions(skill, think, 1)[0].row.messages()[-1]
            lengths[think] = len(message.get("reasoning_content", ""))
        assert lengths["off"] == 0 < lengths["high"] < lengths["max"]
