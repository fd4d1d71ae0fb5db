"""Tools to call and schemas to fill: names and parameters are drawn anew for each row, so they must be copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.tiny.turns import Call, Turn, World
from tools.tiny.world import ANIMALS, CITIES, COLOURS, FOODS, THINGS, WEATHER, WORDS, person

Schema = dict[str, Any]
LANGUAGES = ["French", "German", "Spanish", "Italian"]


@dataclass(frozen=True)
class Kind:
    """A sort of tool: possible names, parameters as (possible names, JSON type), how to ask, how results are told."""

    names: list[str]
    about: str
    parameters: list[tuple[list[str], str]]
    values: Callable[[Random], list[Any]]
    asks: list[str]
    result: Callable[[Random, list[Any]], dict[str, Any]]
    told: str


def _city(rng: Random) -> list[Any]:
    return [rng.choice(CITIES)]


KINDS = [
    Kind(["get_weather", "weather_now"], "Get the weather of a city",
         [(["city", "place"], "string")], _city,
         ["What is the weather in {0}?", "How is the weather in {0}?", "Is it warm in {0}?"],
         lambda rng, v: {"sky": rng.choice(WEATHER), "degrees": rng.randint(1, 35)}, "It is {sky} in {0}, {degrees} degrees."),
    Kind(["get_time", "clock"], "Get the time in a city",
         [(["city", "place"], "string")], _city,
         ["What time is it in {0}?", "Tell me the time in {0}."],
         lambda rng, v: {"time": f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"}, "It is {time} in {0}."),
    Kind(["add", "plus"], "Add two numbers",
         [(["a", "x"], "integer"), (["b", "y"], "integer")],
         lambda rng: [rng.randint(10, 999), rng.randint(10, 999)],
         ["What is {0} + {1}? Use a tool.", "Add {0} and {1} with a tool."],
         lambda rng, v: {"result": v[0] + v[1]}, "The result is {result}."),
    Kind(["multiply", "times"], "Multiply two numbers",
         [(["a", "x"], "integer"), (["b", "y"], "integer")],
         lambda rng: [rng.randint(2, 99), rng.randint(2, 99)],
         ["What is {0} times {1}?", "Multiply {0} by {1}."],
         lambda rng, v: {"result": v[0] * v[1]}, "The result is {result}."),
    Kind(["lookup", "dictionary"], "Look up a word",
         [(["word", "query"], "string")], lambda rng: [rng.choice(WORDS)],
         ["Look up the word {0}.", "What does the word {0} mean?"],
         lambda rng, v: {"found": True, "page": rng.randint(1, 300)}, "The word {0} is on page {page}."),
    Kind(["send_message", "write_to"], "Send a message to a person",
         [(["to", "person"], "string"), (["text", "message"], "string")],
         lambda rng: [person(rng), rng.choice(["hello", "good morning", "come home", "thank you", "see you soon"])],
         ["Send {0} the message: {1}", "Write to {0}: {1}"],
         lambda rng, v: {"sent": True}, "I sent the message to {0}."),
    Kind(["get_price", "shop"], "Get the price of a thing",
         [(["item", "thing"], "string")], lambda rng: [rng.choice(FOODS + THINGS)],
         ["What is the price of {0}?", "How much does {0} cost?"],
         lambda rng, v: {"price": rng.randint(1, 99)}, "The price of {0} is {price}."),
    Kind(["set_timer", "timer"], "Start a timer",
         [(["minutes", "length"], "integer")], lambda rng: [rng.randint(1, 90)],
         ["Set a timer for {0} minutes.", "Wake me in {0} minutes."],
         lambda rng, v: {"ok": True}, "The timer is set to {0} minutes."),
    Kind(["translate", "translation"], "Translate a word",
         [(["word", "text"], "string"), (["language", "to"], "string")],
         lambda rng: [rng.choice(WORDS), rng.choice(LANGUAGES)],
         ["Translate {0} to {1}.", "How do you say {0} in {1}?"],
         lambda rng, v: {"word": _foreign(rng)}, "In {1} it is {word}."),
]  # fmt: skip


def _foreign(rng: Random) -> str:
    return "".join(rng.choice("bdklmnrst") + rng.choice("aeiou") for _ in range(2))


class Toolbox:
    """Two to four declared tools; use() draws a question that one of them answers, as the two turns of a call."""

    def __init__(self, world: World) -> None:
        rng = world.rng
        self.kinds = rng.sample(KINDS, rng.randint(2, 4))
        self.names = [rng.choice(kind.names) for kind in self.kinds]
        self.keys = [self._keys(rng, kind) for kind in self.kinds]

    @staticmethod
    def _keys(rng: Random, kind: Kind) -> list[str]:
        row = rng.randrange(2)
        return [options[row % len(options)] for options, _ in kind.parameters]

    def schemas(self) -> list[Schema]:
        """The declared tools in OpenAI form."""
        return [self._schema(i) for i in range(len(self.kinds))]

    def _schema(self, i: int) -> Schema:
        kind, keys = self.kinds[i], self.keys[i]
        properties = {key: {"type": t} for key, (_, t) in zip(keys, kind.parameters, strict=True)}
        parameters = {"type": "object", "properties": properties, "required": keys}
        return {
            "type": "function",
            "function": {"name": self.names[i], "description": kind.about, "parameters": parameters},
        }

    def use(self, world: World) -> list[Turn]:
        i = world.rng.randrange(len(self.kinds))
        kind, name = self.kinds[i], self.names[i]

        def draw(rng: Random) -> tuple[str, Any]:
            values = kind.values(rng)
            key = f"tool {kind.about} {values}"
            return (key if len(kind.parameters) > 1 else f"{key} {name}"), values

        values = world.fresh(draw)
        call: Call = {"name": name, "arguments": dict(zip(self.keys[i], values, strict=True))}
        result = kind.result(world.rng, values)
        listed = ", ".join(f"{k}: {v}" for k, v in call["arguments"].items())
        asked = Turn(
            "tool", world.rng.choice(kind.asks).format(*values), "",
            f"I use {name}. {listed}.",
            f"The user needs a tool. The tool for this is {name}. I fill in: {listed}. That is all it needs.",
            calls=[call],
        )  # fmt: skip
        told = Turn(
            "result", "", kind.told.format(*values, **result),
            "I have the result.", f"The tool {name} gave a result. I tell it to the user.",
            results=[json.dumps(result)],
        )  # fmt: skip
        return [asked, told]


_FIELDS: dict[str, tuple[str, Callable[[Random], Any], list[str]]] = {
    "name": ("string", person, ["The name is {}.", "I am {}.", "This is {}."]),
    "age": ("integer", lambda r: r.randint(5, 90), ["The age is {}.", "I am {} years old."]),
    "city": ("string", lambda r: r.choice(CITIES), ["I live in {}.", "The city is {}."]),
    "color": ("string", lambda r: r.choice(COLOURS), ["The color is {}.", "I like {}."]),
    "animal": ("string", lambda r: r.choice(ANIMALS), ["I have a {}.", "The animal is a {}."]),
    "food": ("string", lambda r: r.choice(FOODS), ["I eat {}.", "The food is {}."]),
    "thing": ("string", lambda r: r.choice(THINGS), ["I want a {}.", "The thing is a {}."]),
    "price": ("integer", lambda r: r.randint(1, 999), ["The price is {}.", "It costs {}."]),
    "count": ("integer", lambda r: r.randint(2, 20), ["There are {} of them.", "The count is {}."]),
    "friend": ("string", person, ["My friend is {}.", "The friend is called {}."]),
    "happy": ("boolean", lambda r: r.random() < 0.5, ["I am {}happy."]),
}


class Form:
    """A JSON schema of two or three fields, and texts that fill it."""

    def __init__(self, world: World) -> None:
        self.fields = world.rng.sample(list(_FIELDS), world.rng.randint(2, 3))

    def schema(self) -> Schema:
        properties = {field: {"type": _FIELDS[field][0]} for field in self.fields}
        return {"type": "object", "properties": properties, "required": self.fields}

    def fill(self, world: World) -> Turn:
        def draw(rng: Random) -> tuple[str, Any]:
            values = {field: _FIELDS[field][1](rng) for field in self.fields}
            return f"json {values}", values

        values = world.fresh(draw)
        rng = world.rng
        told = {f: rng.choice(_FIELDS[f][2]).format(_spoken(v)) for f, v in values.items()}
        if rng.random() < 0.3:  # one fact more than the schema wants
            extra = rng.choice([f for f in _FIELDS if f not in values])
            told[extra] = rng.choice(_FIELDS[extra][2]).format(_spoken(_FIELDS[extra][1](rng)))
        facts = rng.sample(list(told.values()), len(told))
        listed = ", ".join(f"{k}: {json.dumps(v)}" for k, v in values.items())
        return Turn(
            "json", " ".join(facts), json.dumps(values), f"{listed}.",
            f"The schema wants {', '.join(values)}. I read the text. {listed}. Nothing else belongs into the object.",
        )  # fmt: skip


def _spoken(value: Any) -> str:
    return ("" if value else "not ") if isinstance(value, bool) else str(value)
