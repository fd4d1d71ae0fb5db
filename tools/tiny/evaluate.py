"""Accuracy of a model per skill and thinking level on prompts never trained on, greedy, through the project's Engine.

python -m tools.tiny.evaluate MODEL [--prompts 100] [--skills sum,json] [--think high,max] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from dsv4cli.engine.engine import Engine
from dsv4cli.engine.sampling import Sampling
from tools.tiny.exam import MAIN, REST, Question, questions

LEVELS = ("high", "off", "max")


@dataclass
class Score:
    """How one skill went at one thinking level."""

    skill: str
    think: str
    right: int = 0
    asked: int = 0
    reasoning_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def percent(self) -> float:
        return 100 * self.right / max(self.asked, 1)


def ask(engine: Engine, question: Question, score: Score) -> str:
    """Put one question; returns the answer text and notes the result in the score."""
    answer = ""
    calls: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = question.row.tools or None
    stream = engine.chat(
        question.messages, think=question.row.think, tools=tools, sampling=Sampling(temperature=0), max_tokens=250
    )
    for token in stream:
        answer += token.text if token.kind == "answer" else ""
        score.reasoning_tokens += token.kind == "reasoning"
        score.prompt_tokens += token.prompt_tokens if token.finish else 0
        calls = token.tool_calls or calls
    score.right += question.right(answer, [call["function"] for call in calls])
    score.asked += 1
    return answer or json.dumps(calls)


def evaluate(engine: Engine, skills: Iterable[str], levels: Iterable[str], prompts: int, wrong: bool) -> list[Score]:
    scores = []
    for skill in skills:
        for think in levels:
            score = Score(skill, think)
            # The skills that are only reported get fewer prompts.
            for question in questions(skill, think, prompts if skill in MAIN else max(1, prompts // 2)):  # type: ignore[arg-type]
                before = score.right
                answer = ask(engine, question, score)
                if wrong and score.right == before:
                    print(f"  {question.messages[-1]['content'][-100:]!r}\n    gave {answer!r}")
            scores.append(score)
            print(f"{skill:12} {think:5} {score.percent:6.1f} %  of {score.asked:4}   reasoning tokens "
                  f"{score.reasoning_tokens / score.asked:6.1f}   prompt tokens {score.prompt_tokens / score.asked:7.1f}",
                  flush=True)  # fmt: skip
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy per skill on prompts never trained on.")
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--skills", default=",".join(MAIN + REST))
    parser.add_argument("--think", default=",".join(LEVELS))
    parser.add_argument("--numerics", default="official")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wrong", action="store_true", help="print the questions that went wrong")
    parser.add_argument("--json", metavar="FILE", help="also write the scores as JSON to this file (- for stdout)")
    options = parser.parse_args()
    engine = Engine.open(options.model, numerics=options.numerics, threads=options.threads)
    scores = evaluate(engine, options.skills.split(","), options.think.split(","), options.prompts, options.wrong)
    if options.json:
        text = json.dumps([asdict(s) for s in scores], indent=1)
        if options.json == "-":
            print(text)
        else:
            with open(options.json, "w", encoding="utf-8") as f:
                f.write(text + "\n")


if __name__ == "__main__":
    main()
