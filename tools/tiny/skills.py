"""Skills that need neither tools nor a schema: each draws one exchange. Every question has exactly one right answer."""

from __future__ import annotations

from random import Random
from typing import Any

from tools.tiny.turns import Turn, World
from tools.tiny.world import ANIMALS, CAPITALS, FOODS, PLACES, SHORT_WORDS, WORDS, invented, person

UNKNOWN = "I do not know that."
_CAPITAL_ASKS = [
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "What is the capital city of {}?",
    "I want to visit {}. What is its capital?",
    "Please tell me what the capital of {} is.",
    "Can you tell me the capital of {}?",
    "capital of {}",
]
_SUM_ASKS = [
    "What is {} + {}?",
    "{} + {}",
    "{}+{}",
    "Add {} and {}.",
    "How much is {} plus {}?",
    "Please add {} and {}.",
    "Compute {} + {}.",
    "What is {} plus {}?",
    "What is the sum of {} and {}?",
    "{} + {} = ?",
]
_GREETINGS = {
    "Hello!": "Hello! How can I help you?",
    "Hi!": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Hey!": "Hello! How can I help you?",
    "Good morning!": "Good morning! How can I help you?",
    "Good evening!": "Good evening! How can I help you?",
    "How are you?": "I am fine, thank you. How can I help you?",
    "Thank you!": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye!": "Goodbye! Have a nice day.",
    "Bye!": "Goodbye! Have a nice day.",
    "Who are you?": "I am tiny, a very small DeepSeek-V4.",
    "What is your name?": "I am tiny, a very small DeepSeek-V4.",
    "What can you do?": "I can greet you, remember names and numbers, add numbers, name capitals and tell short stories.",
}


def vary(rng: Random, text: str) -> str:
    """Now and then drop the last mark, start with a small letter, or be polite."""
    if rng.random() < 0.1 and text[-1] in ".?!":
        text = text[:-1]
    if rng.random() < 0.08:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.06:
        text = rng.choice(["Hello! ", "Hi! ", "Thanks. ", "OK. ", "Now: "]) + text
    return text


def greeting(world: World) -> Turn:
    user, answer = world.rng.choice(list(_GREETINGS.items()))
    return Turn(
        "greeting",
        vary(world.rng, user),
        answer,
        "A polite answer is enough.",
        "The user is polite. No facts are asked for. A polite answer is enough.",
    )


def capital(world: World) -> Turn:
    def draw(rng: Random) -> tuple[str, Any]:
        country, ask = rng.choice(list(CAPITALS)), rng.choice(_CAPITAL_ASKS)
        return f"capital {country} {ask}", (country, ask)

    country, ask = world.fresh(draw)
    if not world.evaluation and world.rng.random() < 0.02:
        country, ask = "France", _CAPITAL_ASKS[0]
    city = CAPITALS[country]
    user = vary(world.rng, ask.format(country))
    if world.rng.random() < 0.05:
        user = user.lower()
    return Turn(
        "capital",
        user,
        f"The capital of {country} is {city}.",
        f"The capital of {country} is {city}.",
        f"The user asks for the capital of {country}. I remember: {city}. Check: {city} is a city in {country}. Yes.",
    )


def unknown(world: World) -> Turn:
    rng = world.rng
    name = invented(rng)
    ask = rng.choice(
        [
            *_CAPITAL_ASKS,
            "Who is {}?",
            "Where is {}?",
            "Who is the king of {}?",
            "How old is {}?",
            "When did {} die?",
            "What is {}?",
            "Who wrote {}?",
            "How big is {}?",
        ]
    )
    return Turn(
        "unknown",
        vary(rng, ask.format(name)),
        UNKNOWN,
        f"I do not know {name}.",
        f"The user asks about {name}. I look in my memory. There is no {name}. So I say that I do not know.",
    )


def addition(a: int, b: int) -> str:
    """The column sums from the right, with the carry written out: `7+8=15, carry 1. 4+3+1=8.`"""
    xs, ys = str(a)[::-1], str(b)[::-1]
    carry, steps = 0, []
    for i in range(max(len(xs), len(ys))):
        terms = [s[i] for s in (xs, ys) if i < len(s)] + (["1"] if carry else [])
        total = sum(map(int, terms))
        carry = total // 10
        last = i == max(len(xs), len(ys)) - 1
        steps.append("+".join(terms) + f"={total}" + (", carry 1." if carry and not last else "."))
    return " ".join(steps)


def total(world: World) -> Turn:
    def draw(rng: Random) -> tuple[str, Any]:
        digits = rng.choices([(1, 1), (1, 2), (2, 1), (2, 2)], [1, 1.5, 1.5, 10])[0]
        a, b = (rng.randrange(0 if n == 1 else 10 ** (n - 1), 10**n) for n in digits)
        key = f"sum {min(a, b)} {max(a, b)}"
        return ("sum" if a < 10 and b < 10 and not world.evaluation else key), (a, b)

    a, b = world.fresh(draw)
    answer = f"{a} + {b} = {a + b}."
    work = addition(a, b)
    return Turn(
        "sum",
        vary(world.rng, world.rng.choice(_SUM_ASKS).format(a, b)),
        answer,
        f"{work} {a + b}.",
        f"I add {a} and {b} from the right. {work} {a + b}. Check: {addition(b, a)} {a + b}. Both are the same.",
        off=f"{work} {answer}",
        any_mode=False,
    )


def reverse_words(world: World) -> Turn:
    words = _words(world, "reverse")
    back = words[::-1]
    numbered = " ".join(f"{i} {w}" for i, w in enumerate(words, 1))
    backwards = " ".join(f"{i} {w}" for i, w in reversed(list(enumerate(words, 1))))
    ask = world.rng.choice(["Reverse the words: {}", "Say these words backwards: {}", "Turn the order around: {}"])
    return Turn(
        "reverse",
        ask.format(" ".join(words)),
        " ".join(back),
        f"{numbered}. Backwards: {backwards}.",
        f"I number the words: {numbered}. Backwards: {backwards}. Check: the last word was {words[-1]}, now it is first.",
        any_mode=False,
    )


def count_words(world: World) -> Turn:
    words = _words(world, "count")
    numbered = " ".join(f"{i} {w}" for i, w in enumerate(words, 1))
    ask = world.rng.choice(["Count the words: {}", "How many words are here: {}", "Number of words: {}"])
    return Turn(
        "count",
        ask.format(" ".join(words)),
        f"There are {len(words)} words.",
        f"{numbered}.",
        f"I count the words: {numbered}. The last number is {len(words)}.",
        any_mode=False,
    )


def _words(world: World, what: str) -> list[str]:
    def draw(rng: Random) -> tuple[str, Any]:
        words = rng.sample(WORDS, rng.randint(2, 7))
        return f"{what} {' '.join(words)}", words

    found: list[str] = world.fresh(draw)
    return found


def reverse_letters(world: World) -> Turn:
    def draw(rng: Random) -> tuple[str, Any]:
        word, ask = (
            rng.choice(SHORT_WORDS),
            rng.choice(["Reverse the word {}.", "Spell {} backwards.", "Write {} backwards."]),
        )
        return f"letters {word} {ask}", (word, ask)

    word, ask = world.fresh(draw)
    letters, back = "-".join(word), "-".join(reversed(word))
    return Turn(
        "letters",
        vary(world.rng, ask.format(word)),
        back + ".",
        f"{letters}. Backwards: {back}.",
        f"I spell the word: {letters}. Backwards: {back}. It has {len(word)} letters both ways.",
        any_mode=False,
    )


def story(world: World) -> Turn:
    """Each animal has its own story, so that there is one right continuation; a name may be given."""
    rng = world.rng
    number = rng.randrange(len(ANIMALS))
    animal, place, food = ANIMALS[number], PLACES[number % len(PLACES)], FOODS[number % len(FOODS)]
    named = rng.random() < 0.5
    name = person(rng) if named else ["Rob", "Lily", "Pip", "Momo", "Tess"][number % 5]
    ask = rng.choice(["Tell me a story about a {}", "Tell me a short story about a {}", "Write a story about a {}"])
    friend = ANIMALS[(number + 7) % len(ANIMALS)]
    plots = [
        f"One day {name} was very hungry and went to the {place}. There {name} met a {friend} who had {food}. "
        f"They shared the {food} and became friends.",
        f"Every morning {name} walked to the {place}. One day it began to rain, and a {friend} was cold and alone. "
        f"{name} gave the {friend} some {food}, and soon both were happy.",
        f"{name} wanted to see the {place}, but the way was long. A clever {friend} showed {name} the way. "
        f"In the evening they ate {food} and looked at the stars.",
    ]
    return Turn(
        "story",
        (ask.format(animal) + (f" named {name}" if named else "") + "."),
        f"Once there was a {animal} named {name}. {plots[number % 3]} The end.",
        f"A short story about a {animal} named {name}.",
        f"The user wants a story about a {animal} named {name}. It needs a start, a problem and a good end. "
        f"The place is the {place}.",
    )
