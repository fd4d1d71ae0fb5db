"""A conversion in two lines: its plan, and its files."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from dsv4_quant import recipe
from dsv4_quant.convert import convert
from dsv4_quant.files import open_source
from dsv4_quant.files.headers import read_header
from dsv4_quant.metadata import Origin
from dsv4_quant.plan import Plan, make_plan

ORIGIN = Origin("DeepSeek-V4-Small", "deepseek-ai/DeepSeek-V4-Small", "0123abc", "MIT", "q2 --down q3_k", "{{ messages }}")


def planned(source: Path, output: Path, name: str = "mxfp4", origin: Origin = ORIGIN, **options: Any) -> Plan:
    changes = recipe.rules_of(options.pop("changes", {}))
    return make_plan(read_header(source), output, recipe.named(name), origin, changes=changes, **options)


def written(source: Path, output: Path, name: str = "mxfp4", **options: Any) -> Path:
    plan = planned(source, output, name, **options)
    convert(plan, open_source(source))
    return plan.parts[0].path


def digests(plan: Plan) -> list[str]:
    return [sha256(part.path.read_bytes()).hexdigest() for part in plan.parts]
