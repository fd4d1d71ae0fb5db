"""From the words of a command to the plan of a GGUF, for `dsv4 quantize` and `dsv4 pull --quant`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv4cli.commands.arguments import demand_folder_of
from dsv4cli.errors import UsageError

if TYPE_CHECKING:
    from dsv4_quant.convert import Importance
    from dsv4_quant.files.headers import Header
    from dsv4_quant.metadata import Origin
    from dsv4_quant.plan import Plan, Stages
    from dsv4cli.registry.catalog import Entry

RECIPES = "mxfp4|q4|q3|q2|q1"


class Wanted(NamedTuple):
    """What the options say of the file to write; sizes in bytes."""

    out: str
    recipe: str | None
    changes: dict[str, str]
    stages: Stages
    target_size: int | None
    part_size: int | None
    release: str | None


def planned(entry: Entry, wanted: Wanted, importance: Importance | None, header: Header | None = None) -> Plan:
    """What is to be written, from the source's header, which is read unless it is given."""
    from dsv4_quant import recipe as recipes
    from dsv4_quant.files.headers import read_header
    from dsv4_quant.plan import make_plan

    if wanted.recipe is None and wanted.target_size is None:
        raise UsageError("There is no recipe.", f"Give --recipe {RECIPES}, or --target-size.")
    chosen, rules = recipes.named(wanted.recipe or "q2"), recipes.rules_of(wanted.changes)
    header = header or read_header(entry.located())
    path = output_path(entry, wanted)
    return make_plan(header, path, chosen, _origin(entry, header.metadata, wanted, importance), changes=rules,
                     stages=wanted.stages, target_size=wanted.target_size, part_size=wanted.part_size)


def output_path(entry: Entry, wanted: Wanted) -> Path:
    """The file to write. In a folder it is named after the model; a drafter begins with what it is, as in llama.cpp."""
    path = Path(wanted.out).expanduser()
    if path.is_dir():
        name = re.sub(r"[^\w.-]+", "-", entry.name.removesuffix(".gguf"))
        stages = "" if wanted.stages == "none" else f"{wanted.stages}-"
        return path / f"{stages}{name}-{(wanted.recipe or 'fitted').upper()}.gguf"
    if path.suffix != ".gguf":
        raise UsageError(f"{path} is neither a folder nor the name of a .gguf file.", f"Write -o {path}.gguf.")
    demand_folder_of(path, "-o")
    return path


def _origin(entry: Entry, metadata: dict[str, Any], wanted: Wanted, importance: Importance | None) -> Origin:
    """What to say about the weights; a GGUF of no known repository keeps the name that it gives itself."""
    from dsv4_quant.metadata import Origin
    from dsv4cli.encoding.jinja import chat_template
    from dsv4cli.engine.release import release_of

    name = (entry.repo or str(metadata.get("general.name") or entry.name)).rpartition("/")[2].removesuffix(".gguf")
    size = [f"--target-size {wanted.target_size}"] if wanted.target_size else []
    said = [wanted.recipe or "", *size, *(f"--{role} {kind}" for role, kind in sorted(wanted.changes.items()))]
    return Origin(
        name, entry.repo, entry.revision, entry.license or None, recipe=" ".join(said).strip(),
        chat_template=chat_template(release_of(entry, metadata, wanted.release)),
        imatrix=importance.keys if importance is not None else {})
