"""Rows of training text: conversations of mixed skills, deterministic by seed.

python -m tools.tiny.data --seed 1 --rows 5        # shows some conversations as text
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tools.tiny import skills
from tools.tiny.calls import Form, Schema, Toolbox
from tools.tiny.memory import Hidden, People, sentence
from tools.tiny.turns import Think, Turn, World

SYSTEMS = [
    "You are a helpful assistant.",
    "You are tiny.",
    "Answer the user.",
    "You are a friendly assistant.",
    "Be brief.",
]
LEVELS: list[Think] = ["off", "high", "max"]
# How often each kind of row is drawn, and each skill inside a plain conversation.
ROW_SHARES = {"chat": 0.5, "sums": 0.2, "tools": 0.13, "json": 0.17}
HIDDEN_TOKENS = 0.4  # share of all tokens that belong to rows with hidden numbers
SKILL_SHARES = {
    "sum": 5.0, "capital": 3.0, "greeting": 1.0, "unknown": 1.2, "reverse": 1.0, "count": 1.0, "letters": 0.7,
    "story": 0.6, "tell": 2.0, "ask": 4.0,
}  # fmt: skip


@dataclass
class Row:
    """One conversation: its turns, how the model is to think, and what the system message declares."""

    kind: str
    turns: list[Turn]
    think: Think
    system: str | None = None
    tools: list[Schema] = field(default_factory=list)
    schema: Schema | None = None

    def messages(self) -> list[dict[str, Any]]:
        """OpenAI-style messages, reasoning included."""
        found: list[dict[str, Any]] = []
        if self.system is not None or self.schema is not None:
            found.append({"role": "system", "content": self.system or ""})
            if self.schema is not None:
                found[0]["response_format"] = self.schema
        for number, turn in enumerate(self.turns):
            if turn.results:
                previous = f"call_{number - 1}"
                found += [{"role": "tool", "tool_call_id": previous, "content": text} for text in turn.results]
            else:
                found.append({"role": "user", "content": turn.user})
            found.append(self._assistant(turn, number))
        return found

    def _assistant(self, turn: Turn, number: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": turn.answer}
        if self.think == "off":
            message["content"] = turn.off or turn.answer
        else:
            message["reasoning_content"] = turn.short if self.think == "high" else turn.long
        if turn.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
                }
                for call in turn.calls
            ]
        return message


@dataclass(frozen=True)
class Mixture:
    """What to draw: shares of the other row kinds and of skills, and how long hidden-number rows may get in tokens."""

    rows: dict[str, float] = field(default_factory=lambda: dict(ROW_SHARES))
    skills: dict[str, float] = field(default_factory=lambda: dict(SKILL_SHARES))
    reach: int = 300
    hidden: float = HIDDEN_TOKENS
    dense: float = 0.3  # share of the rows with hidden numbers that are full of them

    def hidden_rows(self) -> float:
        """The share of rows that gives hidden numbers their share of tokens; means measured on the generator."""
        mean = 100 + self.reach * (0.28 + 0.65 / math.log(max(self.reach, 30) / 20))
        mean = self.dense * 550 + (1 - self.dense) * mean
        return self.hidden * 170 / (self.hidden * 170 + (1 - self.hidden) * mean)


def draw_row(world: World, mix: Mixture) -> Row:
    rng = world.rng
    kind = "hidden" if rng.random() < mix.hidden_rows() else _pick(rng, mix.rows)
    think = rng.choices(LEVELS, [3, 5, 2])[0]
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else None
    if kind == "tools":
        return _tool_row(world, think, system)
    if kind == "json":
        form = Form(world)
        turns = [form.fill(world) for _ in range(rng.randint(1, 3))]
        return Row(kind, turns, think, system, schema=form.schema())
    if kind == "sums":  # without thinking every sum of the row is worked out and learnt, with it only the last one
        turns = [skills.total(world) for _ in range(rng.randint(2, 5) if think == "off" else 1)]
        return Row(kind, turns, think, system)
    if kind == "hidden":
        return _hidden_row(world, think, system, mix)
    return Row(kind, _chat(world, mix, rng.randint(1, 5) if think == "off" else rng.randint(1, 4)), think, system)


def _pick(rng: Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _chat(world: World, mix: Mixture, count: int) -> list[Turn]:
    people = People()
    return [_one(world, mix, people) for _ in range(count)]


def _one(world: World, mix: Mixture, people: People) -> Turn:
    name = _pick(world.rng, mix.skills)
    if name == "tell" or (name == "ask" and not people.known and world.rng.random() < 0.85):
        return people.tell(world)
    if name == "ask":
        return people.ask(world)
    return SIMPLE[name](world)


SIMPLE = {
    "sum": skills.total,
    "capital": skills.capital,
    "greeting": skills.greeting,
    "unknown": skills.unknown,
    "reverse": skills.reverse_words,
    "count": skills.count_words,
    "letters": skills.reverse_letters,
    "story": skills.story,
}


def _tool_row(world: World, think: Think, system: str | None) -> Row:
    box = Toolbox(world)
    turns: list[Turn] = []
    for _ in range(world.rng.randint(1, 3)):
        if world.rng.random() < 0.12:
            turns.append(world.rng.choice([skills.greeting, skills.capital])(world))
        else:
            turns += box.use(world)
    return Row("tools", turns, think, system, tools=box.schemas())


def _hidden_row(world: World, think: Think, system: str | None, mix: Mixture) -> Row:
    """Facts in filler; the first question follows the text at once, others come turns later.

    The amount of filler is drawn log-uniformly up to the reach, about ten tokens a sentence.
    """
    rng, hidden = world.rng, Hidden()
    if rng.random() < mix.dense:
        return _dense_row(world, think, system, mix)
    tokens = 20 * (max(mix.reach, 21) / 20) ** rng.random()
    if rng.random() < 0.35:
        tokens = mix.reach * rng.uniform(0.6, 1.0)
    facts = rng.randint(1, 3) if tokens < 100 else rng.randint(2, 8)
    text = hidden.text(world, max(1, int(tokens / 10)), facts)
    if rng.random() < 0.3:
        text = rng.choice(["Read this text. ", "Here is a story. ", "Remember this: "]) + text
    turns = []
    for what in rng.sample(list(hidden.numbers), min(len(hidden.numbers), rng.randint(2, 8))):
        turns.append(hidden.ask(world, what))
        if rng.random() < 0.1:
            turns.append(Turn("greeting", sentence(rng), "OK.", "A remark.", "Only a remark. Nothing is asked."))
    turns[0].user = f"{text} {turns[0].user}" if rng.random() < 0.7 else f"{text}\n\n{turns[0].user}"
    return Row("hidden", turns, think, system)


def _dense_row(world: World, think: Think, system: str | None, mix: Mixture) -> Row:
    """Many facts, then filler that carries them out of the window, then a question for almost every fact.

    Only the compressed entries can answer, and each row gives many answers: from these rows they learn to.
    """
    rng, hidden = world.rng, Hidden()
    facts = hidden.text(world, rng.randint(0, 6), rng.randint(6, 12))
    tokens = 40 * max(mix.reach / 80, 1) ** rng.random()
    text = facts + " " + " ".join(sentence(rng) for _ in range(max(1, int(tokens / 10))))
    turns = [hidden.ask(world, what) for what in rng.sample(list(hidden.numbers), len(hidden.numbers) - 1)]
    turns[0].user = f"{text} {turns[0].user}"
    return Row("hidden", turns, think, system)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show rows of the training text.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--reach", type=int, default=120)
    options = parser.parse_args()
    world = World(Random(options.seed))
    for _ in range(options.rows):
        row = draw_row(world, Mixture(reach=options.reach))
        print(f"--- {row.kind}, thinking {row.think}")
        for message in row.messages():
            print({k: v for k, v in message.items() if k != "id"})


if __name__ == "__main__":
    main()
