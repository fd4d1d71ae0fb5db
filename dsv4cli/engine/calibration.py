"""The calibration set that comes with dsv4: what a model is asked to do, in small, all of it written for this purpose.

Prose, code and some fifteen languages are texts in assets/calibration; conversations there (with reasoning, tools, effort
levels) are rendered as every conversation is. Tables, logs, sums and tool calls with ever other values are generated from a
few words, always the same ones. At the end stands one long timeline of everything, for what only long contexts use.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4cli import paths
from dsv4cli.encoding.template import Release, render, think_level
from dsv4cli.engine.importance import in_windows
from dsv4cli.engine.loaded import Loaded

GENERATED = 60  # conversations and papers of each kind
PLACES = ("Oslo", "Porto", "Nairobi", "Lima", "Osaka", "Leeds", "Graz", "Tunis", "Hanoi", "Quito", "Cork", "Pune")
PEOPLE = ("Amina", "Bruno", "Chiara", "Dmitri", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jun", "Katja", "Luis")
THINGS = ("lamp", "kettle", "ladder", "drill", "tent", "violin", "bicycle", "blanket", "compass", "mirror", "stove", "vase")
SERVICES = ("auth", "billing", "search", "mail", "images", "queue")
EVENTS = ("request finished", "connection reset by peer", "cache miss", "retrying", "token expired", "slow query",
          "worker started", "disk almost full")
QUOTE = {"type": "function", "function": {
    "name": "price_of", "description": "The price of a thing at a place.",
    "parameters": {"type": "object", "properties": {
        "thing": {"type": "string"}, "place": {"type": "string"}, "count": {"type": "integer"},
        "used": {"type": "boolean"}}, "required": ["thing", "place"]}}}


def samples(engine: Loaded, window: int, folder: Path | None = None) -> list[list[int]]:
    """The set as timelines of ids, none longer than `window` but for the last, which is as long as four, or the context."""
    folder = folder or paths.bundled("calibration")
    bos = engine.config.bos_token_id
    found, everything = [], []
    for path in sorted(folder.glob("*.txt")):
        ids = engine.tokenizer.encode_text(path.read_text(encoding="utf-8"))
        found += list(in_windows(ids, bos, window))
        everything += ids
    told = json.loads((folder / "chats.json").read_text(encoding="utf-8"))
    for chat in (*told, *generated()):
        ids = _rendered(engine, chat)
        found.append(ids[:window])
        everything += ids[1:]
    for paper in papers():
        ids = engine.tokenizer.encode_text(paper)
        found += list(in_windows(ids, bos, window))
        everything += ids
    return [*found, [bos, *everything[:min(4 * window, engine.ctx) - 1]]]


def _rendered(engine: Loaded, chat: dict[str, Any]) -> list[int]:
    release: Release = "0731" if engine.release == "0731" else "april"
    thinking = bool(chat.get("thinking"))
    effort = think_level(chat.get("effort", "high"), release)[1] if thinking else None
    return engine.tokenizer.encode(render(chat["messages"], thinking=thinking, effort=effort, release=release,
                                          tools=chat.get("tools")))


def generated() -> Iterator[dict[str, Any]]:
    """Conversations that differ in their values: sums with and without reasoning, tool calls, structured answers."""
    chance = random.Random(4)
    for _ in range(GENERATED):
        yield _sum(chance)
        yield _call(chance)
        yield _record(chance)


def _sum(chance: random.Random) -> dict[str, Any]:
    person, thing, count, price = chance.choice(PEOPLE), chance.choice(THINGS), chance.randint(2, 40), chance.randint(3, 900)
    paid = count * price + chance.randint(0, 99)
    steps = (f"{count} times {price} is {count * price}. {person} paid {paid}, so the change is {paid} - {count * price} = "
             f"{paid - count * price}.")
    question = f"{person} buys {count} of these ({thing}, {price} each) and pays {paid}. How much change is there?"
    answer = {"role": "assistant", "content": f"The change is **{paid - count * price}**."}
    thinking = chance.random() < 0.5
    if thinking:
        answer["reasoning_content"] = steps
    else:
        answer["content"] = f"{steps} {answer['content']}"
    return {"thinking": thinking, "messages": [{"role": "user", "content": question}, answer]}


def _call(chance: random.Random) -> dict[str, Any]:
    calls, results, wanted, prices = [], [], [], []
    for number in range(chance.randint(1, 3)):
        values = {"thing": chance.choice(THINGS), "place": chance.choice(PLACES), "count": chance.randint(1, 12),
                  "used": chance.random() < 0.3}
        calls.append({"id": f"call_{number}", "type": "function",
                      "function": {"name": "price_of", "arguments": json.dumps(values)}})
        wanted.append(str(values["thing"]))
        prices.append(chance.randint(100, 99999) / 100)
        results.append({"role": "tool", "tool_call_id": f"call_{number}",
                        "content": json.dumps({"price": prices[-1], "currency": "EUR"})})
    told = ", ".join(map(str, prices))
    return {"thinking": chance.random() < 0.5, "tools": [QUOTE], "messages": [
        {"role": "user", "content": f"What do I pay for: {', '.join(wanted)}?"},
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "I ask for the prices."}, *results,
        {"role": "assistant", "reasoning_content": "That is all.", "content": f"In this order: {told} EUR."}]}


def _record(chance: random.Random) -> dict[str, Any]:
    name, place, age = chance.choice(PEOPLE), chance.choice(PLACES), chance.randint(18, 90)
    likes = chance.sample(THINGS, chance.randint(1, 4))
    said = f"{name} is {age} years old, lives in {place} and owns a {', a '.join(likes)}."
    fields = {"name": name, "age": age, "city": place, "owns": likes}
    return {"messages": [{"role": "system", "content": "Answer with one JSON object and nothing else."},
                         {"role": "user", "content": f"Extract the facts: {said}"},
                         {"role": "assistant", "content": json.dumps(fields, indent=chance.choice((None, 2)))}]}


def papers() -> Iterator[str]:
    """Texts that are no sentences: logs, tables as CSV and Markdown, lists of records."""
    chance = random.Random(5)
    stamp = 1_767_225_600
    logs, table, records = [], ["date,place,thing,count,price"], []
    marked = ["| person | place | thing | price |", "|---|---|---|---:|"]
    for _ in range(GENERATED * 3):
        stamp += chance.randint(1, 4000)
        logs.append(_log(chance, stamp))
        person, place, thing = chance.choice(PEOPLE), chance.choice(PLACES), chance.choice(THINGS)
        price = chance.randint(100, 99999) / 100
        table.append(f"2026-{stamp % 12 + 1:02d}-{stamp % 28 + 1:02d},{place},{thing},{chance.randint(1, 30)},{price:.2f}")
        marked.append(f"| {person} | {place} | {thing} | {price:.2f} |")
        records.append(json.dumps({"id": stamp, "who": person, "where": {"city": place, "floor": chance.randint(0, 9)},
                                   "what": [thing], "paid": price > 300}))
    yield from ("\n".join(lines) for lines in (logs, table, marked, records))


def _log(chance: random.Random, stamp: int) -> str:
    hours, rest = divmod(stamp % 86400, 3600)
    return (f"2026-01-{stamp % 28 + 1:02d}T{hours:02d}:{rest // 60:02d}:{rest % 60:02d}Z "
            f"{chance.choice(('INFO', 'WARN', 'ERROR'))} {chance.choice(SERVICES)}[{chance.randint(100, 9999)}]: "
            f"{chance.choice(EVENTS)} id={chance.getrandbits(48):012x} ms={chance.randint(1, 9000)}")
