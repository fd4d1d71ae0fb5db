"""The small world that `tiny` knows: names, places, things, words, and what is kept away from training."""

# ruff: noqa: SIM905 (long word lists read better as text)

from __future__ import annotations

import hashlib
from random import Random

CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|England:London|Ireland:Dublin|Norway:Oslo|"
        "Sweden:Stockholm|Finland:Helsinki|Denmark:Copenhagen|Poland:Warsaw|Austria:Vienna|Hungary:Budapest|"
        "Greece:Athens|Turkey:Ankara|Russia:Moscow|Ukraine:Kyiv|Romania:Bucharest|Bulgaria:Sofia|Serbia:Belgrade|"
        "Croatia:Zagreb|Belgium:Brussels|Iceland:Reykjavik|Switzerland:Bern|Japan:Tokyo|China:Beijing|India:New Delhi|"
        "Thailand:Bangkok|Vietnam:Hanoi|Nepal:Kathmandu|Iran:Tehran|Iraq:Baghdad|Egypt:Cairo|Kenya:Nairobi|"
        "Morocco:Rabat|Ghana:Accra|Nigeria:Abuja|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Peru:Lima|Chile:Santiago|"
        "Brazil:Brasilia|Argentina:Buenos Aires|Colombia:Bogota|Australia:Canberra|Estonia:Tallinn"
    ).split("|")
)
CITIES = [c for c in CAPITALS.values() if " " not in c]
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor Wendy Adam "
    "Bella Carl Dora Eric Fiona George Hanna Ivan Julia Karl Lena Max Nina Oscar Petra Ralf Sara Tom Ursula Vera Will "
    "Zoe Alice Bob Diana Frank Maria Peter Lucy Simon Laura Martin Emily Hugo Nora Oliver Ruth Theo"
).split()
COLOURS = "red blue green yellow black white brown pink purple orange".split()
THINGS = "box door key book bag lamp boat car chair cup tower garden".split()
ANIMALS = (
    "dog cat fox bear bird horse cow mouse rabbit lion tiger wolf duck goose fish frog sheep goat owl snake".split()
)
PLACES = "river forest house market bridge school garden hill lake station village tower beach field".split()
FOODS = "bread cheese soup rice cake apples fish salad honey pasta".split()
ADJECTIVES = "old small quiet happy tired clever slow young brave hungry".split()
VERBS = "walked ran looked waited slept sang rested played sat jumped".split()
WEATHER = "sunny rainy cloudy windy snowy foggy".split()
WORDS = sorted(
    {*COLOURS, *THINGS, *ANIMALS, *PLACES, *FOODS, *ADJECTIVES, *WEATHER, *"sun moon tree star rain".split()}
)
SHORT_WORDS = [w for w in WORDS if len(w) <= 5]
_ONSETS = "b d f g k l m n p r s t v z br dr kr tr st".split()
_ENDS = "a o i an en ar el is on ik us ia".split()


def invented(rng: Random) -> str:
    """A capitalised name that means nothing: it can only be copied, or not be known."""
    middle = rng.choice(_ONSETS) + rng.choice("aeiou") if rng.random() < 0.6 else ""
    return (rng.choice(_ONSETS) + rng.choice("aeiou") + middle + rng.choice(_ONSETS) + rng.choice(_ENDS)).capitalize()


def person(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.96 else invented(rng)


def held_out(key: str) -> bool:
    """True for the eighth of all contents that is never trained on; decided by the content alone."""
    return hashlib.sha1(key.encode()).digest()[0] % 8 == 0
