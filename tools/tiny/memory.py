"""Things to remember: names told earlier in the conversation, and numbers hidden in a long text."""

from __future__ import annotations

from random import Random
from typing import Any

from tools.tiny.skills import vary
from tools.tiny.turns import Turn, World
from tools.tiny.world import ADJECTIVES, ANIMALS, COLOURS, FOODS, NAMES, PLACES, THINGS, VERBS, WEATHER, person

_WHO = {
    "name": ("Your name is {}.", ["My name is {}.", "I am {}.", "I am called {}.", "Hello, my name is {}.", "Call me {}."],
             ["What is my name?", "Do you remember my name?", "Who am I?", "Can you tell me my name?"]),
    "friend": ("Your friend is called {}.", ["My friend is called {}.", "I have a friend named {}.", "My best friend is {}."],
               ["What is my friend called?", "Who is my friend?", "What is the name of my friend?"]),
    "dog": ("Your dog is called {}.", ["My dog is called {}.", "I have a dog named {}.", "The name of my dog is {}."],
            ["What is my dog called?", "What is the name of my dog?", "Do you know my dog?"]),
}  # fmt: skip


class People:
    """The people named so far in one conversation: tell() introduces one, ask() asks for one."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def tell(self, world: World) -> Turn:
        kind = world.rng.choice([k for k in _WHO if k not in self.known] or list(_WHO))

        def draw(rng: Random) -> tuple[str, Any]:
            name, told = person(rng), rng.choice(_WHO[kind][1])
            return f"name {name} {told}", (name, told)

        name, told = world.fresh(draw)
        self.known[kind] = name
        what = {"name": f"Nice to meet you, {name}!", "friend": f"{name} is a nice name for a friend.",
                "dog": f"{name} is a nice name for a dog."}[kind]  # fmt: skip
        return Turn(
            "tell", vary(world.rng, told.format(name)), what,
            f"The name is {name}.", f"The user tells me a name: {name}. I should remember {name} and be polite.",
        )  # fmt: skip

    def ask(self, world: World) -> Turn:
        told = self.known and (world.evaluation or world.rng.random() < 0.9)
        kind = world.rng.choice(list(self.known if told else _WHO))
        name = self.known.get(kind)
        user = vary(world.rng, world.rng.choice(_WHO[kind][2]))
        if name is None:
            return Turn("not told", user, "You have not told me.", "I was not told.",
                        "I look for the name in our conversation. It is not there. I was not told.")  # fmt: skip
        return Turn(
            "names", user, _WHO[kind][0].format(name),
            f"I was told: {name}.",
            f"The user asks for a name. I look at our conversation. I was told: {name}. So the name is {name}.",
        )  # fmt: skip


def sentence(rng: Random) -> str:
    """One sentence of story filler, about ten tokens, never with a number."""
    name, animal, place = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES)
    adjective, verb, food = rng.choice(ADJECTIVES), rng.choice(VERBS), rng.choice(FOODS)
    return rng.choice([
        f"{name} {verb} near the {place}.",
        f"The {adjective} {animal} {verb} by the {place}.",
        f"It was {rng.choice(WEATHER)} at the {place}.",
        f"{name} gave the {animal} some {food}.",
        f"{name} and {rng.choice(NAMES)} ate {food} at the {place}.",
        f"A {adjective} {animal} {verb} all day.",
        f"Then {name} saw a {rng.choice(COLOURS)} {rng.choice(THINGS)} near the {place}.",
    ])  # fmt: skip


class Hidden:
    """Numbers hidden in one conversation: `text` grows filler with facts in it, `ask` asks for one of them."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def fact(self, world: World) -> str:
        def draw(rng: Random) -> tuple[str, Any]:
            what = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
            number = rng.randrange(10, 1000)
            return f"needle {what} {number}", (what, number)

        while True:
            what, number = world.fresh(draw)
            if what not in self.numbers:
                break
        self.numbers[what] = number
        return f"The secret number of the {what} is {number}."

    def text(self, world: World, sentences: int, facts: int) -> str:
        parts = [sentence(world.rng) for _ in range(sentences)]
        for _ in range(facts):
            parts.insert(world.rng.randint(0, len(parts)), self.fact(world))
        return " ".join(parts)

    def ask(self, world: World, what: str | None = None) -> Turn:
        rng = world.rng
        what = what or rng.choice(list(self.numbers))
        number = self.numbers[what]
        user = rng.choice([
            "What is the secret number of the {}?", "Tell me the secret number of the {}.",
            "Which secret number has the {}?", "Do you remember the secret number of the {}?",
        ]).format(what)  # fmt: skip
        return Turn(
            "hidden", user, f"The secret number of the {what} is {number}.",
            f"I look for the {what}. The secret number of the {what} is {number}.",
            f"The user asks for the {what}. I look for it in the text. The secret number of the {what} is {number}. "
            f"I look again: the {what} is {number}.",
        )  # fmt: skip
