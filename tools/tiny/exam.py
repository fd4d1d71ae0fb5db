"""Exam questions: prompts whose content was never trained on, and how an answer to each is judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.tiny import skills
from tools.tiny.calls import Form, Toolbox
from tools.tiny.data import SYSTEMS, Row
from tools.tiny.memory import Hidden, People, sentence
from tools.tiny.turns import Think, Turn, World

MAIN = ("sum", "capital", "names", "tool", "json", "hidden 2000")
REST = (
    "result",
    "hidden 200",
    "hidden 1000",
    "greeting",
    "unknown",
    "not told",
    "reverse",
    "count",
    "letters",
    "story",
)
SEED = 20260


@dataclass(frozen=True)
class Question:
    """A row whose last turn is the question; everything before it is history."""

    skill: str
    row: Row

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.row.messages()[:-1]

    def right(self, content: str, calls: list[dict[str, Any]]) -> bool:
        """Judge the answer text and the parsed tool calls ({"name", "arguments"} with arguments as JSON text)."""
        turn = self.row.turns[-1]
        if turn.calls:
            found = [{"name": c["name"], "arguments": _parsed(c["arguments"])} for c in calls]
            return found == turn.calls
        if turn.skill == "json":
            return not calls and _parsed(content) == json.loads(turn.answer)
        if turn.skill in ("sum", "hidden"):  # the last number counts, whatever the words around it
            return not calls and re.findall(r"\d+", content)[-1:] == re.findall(r"\d+", turn.answer)[-1:]
        return not calls and content.strip() == turn.answer


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def questions(skill: str, think: Think, count: int) -> list[Question]:
    """`count` questions of one skill; the same ones for every call."""
    world = World(Random(f"{SEED} {skill} {think}"), evaluation=True)
    found: list[Question] = []
    while len(found) < count:
        row = _row(world, skill, think)
        if row.turns[-1].skill == skill.split(" ")[0] or row.turns[-1].skill == skill:
            found.append(Question(skill, row))
    return found


def _row(world: World, skill: str, think: Think) -> Row:
    rng = world.rng
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else None
    if skill in ("tool", "result"):
        box = Toolbox(world)
        turns = [turn for _ in range(rng.randint(1, 2)) for turn in box.use(world)]
        return Row("tools", turns if skill == "result" else turns[:-1], think, system, tools=box.schemas())
    if skill == "json":
        form = Form(world)
        return Row("json", [form.fill(world) for _ in range(rng.randint(1, 2))], think, system, schema=form.schema())
    if skill.startswith("hidden"):
        return Row("hidden", [_hidden(world, int(skill.split()[1]))], think, system)
    return Row("chat", _talk(world, skill), think, system)


def _talk(world: World, skill: str) -> list[Turn]:
    rng, people = world.rng, People()
    between = [SIMPLE[rng.choice(["capital", "greeting", "sum", "unknown"])](world) for _ in range(rng.randint(0, 2))]
    if skill in ("names", "not told"):
        if skill == "names":
            return [people.tell(world), *between, people.ask(world)]
        return [*between, people.ask(world)]
    return [*between, SIMPLE[skill](world)]


def _hidden(world: World, tokens: int) -> Turn:
    """The wanted fact first, then at least `tokens` tokens of filler (a sentence has more than seven) with other facts."""
    hidden = Hidden()
    wanted = hidden.fact(world)
    what = next(iter(hidden.numbers))
    parts = [sentence(world.rng) for _ in range(3)] + [wanted]
    after = [sentence(world.rng) for _ in range(tokens // 7)]
    for _ in range(3):
        after.insert(world.rng.randrange(len(after)), hidden.fact(world))
    turn = hidden.ask(world, what)
    turn.user = " ".join([*parts, *after, turn.user])
    return turn


SIMPLE: dict[str, Callable[[World], Turn]] = {
    "sum": skills.total,
    "capital": skills.capital,
    "greeting": skills.greeting,
    "unknown": skills.unknown,
    "reverse": skills.reverse_words,
    "count": skills.count_words,
    "letters": skills.reverse_letters,
    "story": skills.story,
}
