"""What is said about a quantised file, on the file and beside it: figures in its metadata, and a model card.

The card is the README.md of the folder. It is written from the files' own headers alone, so it can be written again at any
time, and it names every file of the folder that dsv4 made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4_quant.errors import QuantError, WrongUse
from dsv4_quant.files import gguf_header, gguf_writer
from dsv4_quant.files.info import TensorInfo
from dsv4_quant.metadata import HUB, QUALITY
from dsv4_quant.recipe import slot_of
from dsv4_quant.units import in_bytes

RECIPE = "dsv4.recipe"
MARK = "<!-- Written by dsv4 quantize, which replaces this file. Remove this line to keep your changes. -->"
RUNNING = """\
With dsv4:

```
dsv4 chat ./{name}
dsv4 run ./{name} "Why is the sky blue?"
```

With llama.cpp, whose server finds the chat format in the file:

```
llama-server -m {name} --jinja -c 32768
```"""
SLOTS = {"embed": "embedding", "output": "head", "attention": "attention", "indexer": "indexer", "shared": "shared experts",
         "gate_up": "routed experts, gate and up", "down": "routed experts, down", "rest": "norms, mixers, routers, compressors"}


@dataclass(frozen=True)
class Described:
    """A file, or the first of several parts, with what its header says."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[TensorInfo]
    nbytes: int  # of all parts
    parts: int

    @classmethod
    def of(cls, path: Path) -> Described:
        """Raises CorruptFile and UnsupportedModel as the reader of headers does."""
        parts = gguf_header.read_parts(path)
        return cls(path, parts[0].metadata, [info for part in parts for info in part.tensors.values()],
                   sum(part.path.stat().st_size for part in parts), len(parts))

    @property
    def bits(self) -> float:
        """Bits a weight, on average."""
        return 8 * sum(info.nbytes for info in self.tensors) / max(1, sum(map(_weights, self.tensors)))

    @property
    def quality(self) -> dict[str, Any] | None:
        """What was measured, or None."""
        try:
            found = json.loads(str(self.metadata.get(QUALITY, "")))
        except ValueError:  # the blanks that were reserved
            return None
        return found if isinstance(found, dict) and isinstance(found.get("contexts"), list) else None


def demand_room(path: Path) -> None:
    """Raises WrongUse unless `record` will find room in the file; measuring takes long."""
    if QUALITY not in gguf_header.read(path).metadata:
        raise WrongUse(f"{path} has no key {QUALITY}.", "Only files that dsv4 quantize wrote have room for figures.")


def record(path: Path, quality: Mapping[str, Any]) -> None:
    """Puts figures into the room that the file's header has for them; nothing else of the file changes.

    quality: "reference", "text" and "contexts", a list of the figures at each context length. Raises WrongUse for a file
    without that room.
    """
    gguf_writer.fill_text(path, QUALITY, json.dumps(_rounded(quality), ensure_ascii=False))


def _rounded(value: Any) -> Any:
    """Eight digits are more than these figures have."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def write_card(path: Path) -> Path:
    """Writes the card of the folder that `path` is in; returns its path.

    A README.md that somebody else wrote stays, and the card is called after the file. Raises OSError, and CorruptFile for
    `path` itself.
    """
    described = Described.of(path)
    others = [found for found in _others(path.parent) if found.path != path]
    card = path.with_name("README.md")
    if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        card, others = path.with_suffix(".README.md"), []
    draft = card.with_name(f".{card.name}.{os.getpid()}.part")
    try:
        draft.write_text(model_card(sorted([described, *others], key=lambda each: each.nbytes)), encoding="utf-8")
        draft.replace(card)
    finally:
        draft.unlink(missing_ok=True)
    return card


def _others(folder: Path) -> Iterator[Described]:
    """What dsv4 made in a folder; files that cannot be read are not this card's business."""
    for path in sorted(folder.glob("*.gguf")):
        try:
            if RECIPE in gguf_header.read(path).metadata:
                yield Described.of(path)
        except (QuantError, OSError):
            continue


# ---- the card ------------------------------------------------------------------------------------------------------


def model_card(files: Sequence[Described]) -> str:
    """Markdown with the hub's front matter, for files of one model."""
    first = files[0].metadata
    name = str(first.get("general.name", "DeepSeek-V4"))
    repo = str(first.get("general.base_model.0.repo_url", "")).removeprefix(HUB) or None
    sections = [_front(first, repo), MARK, f"# {name}, quantised", _origin(first, repo), "## Files", *_files(files),
                "## Quality", *_quality(files), "## What is stored how", *_types(files), "## Importance", *_importance(files),
                "## Running it", _running(files[0]), "## License", _license(first, repo)]
    return "\n\n".join(sections) + "\n"


def _front(metadata: Mapping[str, Any], repo: str | None) -> str:
    lines = ["---"]
    if metadata.get("general.license"):
        lines.append(f"license: {metadata['general.license']}")
    if repo:
        lines += [f"base_model: {repo}", "base_model_relation: quantized"]
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags: [gguf, dsv4]", "---"])


def _origin(metadata: Mapping[str, Any], repo: str | None) -> str:
    revision = metadata.get("general.base_model.0.version")
    at = f" at revision `{revision}`" if revision else ""
    source = f"[{repo}]({HUB}{repo}){at}" if repo else "a checkpoint whose origin was not recorded"
    return f"GGUF files made by `dsv4 quantize` from {source}."


def _files(files: Sequence[Described]) -> Iterator[str]:
    rows = [(f"`{each.path.name}`" + (f" and {each.parts - 1} more" if each.parts > 1 else ""), str(each.metadata.get(RECIPE)),
             in_bytes(each.nbytes), f"{each.bits:.2f}") for each in files]
    yield _table(("file", "recipe", "size", "bits a weight"), rows, right=(2, 3))


def _quality(files: Sequence[Described]) -> Iterator[str]:
    rows, said = [], set()
    for each in files:
        for figures in (each.quality or {}).get("contexts", ()):
            rows.append((f"`{each.path.name}`", f"{figures['window']:,}", f"{figures['perplexity']:.4f}",
                         f"{figures['reference_perplexity']:.4f}", f"{figures['kl']:.5f} ± {figures['kl_error']:.5f}",
                         f"{figures['kl_p99']:.4f}", f"{figures['top1']:.2%}"))
            said.add((str(each.quality["reference"]), str(each.quality["text"]), figures["tokens"]))  # type: ignore[index]
    if not rows:
        yield "Not measured. `dsv4 quantize --check` and `dsv4 eval kld` do."
        return
    yield _table(("file", "context", "perplexity", "of the reference", "KL mean", "KL 99 %", "top-1 equal"), rows,
                 right=range(1, 7))
    where = "; ".join(f"{tokens:,} tokens of {text}, against {reference}" for reference, text, tokens in sorted(said))
    yield (f"Measured over {where}. KL is the divergence of the file's predictions from the reference's in nats a token, "
           "its mean and what 99 % of the tokens stay below; top-1 is how often both expect the same token.")


def _types(files: Sequence[Described]) -> Iterator[str]:
    for each in files:
        groups: dict[str, list[TensorInfo]] = {}
        for info in each.tensors:
            groups.setdefault(slot_of(info.name), []).append(info)
        rows = [(SLOTS[slot], ", ".join(_kinds(groups[slot])), in_bytes(sum(info.nbytes for info in groups[slot])))
                for slot in SLOTS if slot in groups]
        yield f"`{each.path.name}`"
        yield _table(("part", "types", "size"), rows, right=(2,))


def _kinds(tensors: Sequence[TensorInfo]) -> list[str]:
    """The types, the commonest first."""
    weights: dict[str, int] = {}
    for info in tensors:
        weights[info.dtype] = weights.get(info.dtype, 0) + _weights(info)
    return sorted(weights, key=lambda kind: -weights[kind])


def _importance(files: Sequence[Described]) -> Iterator[str]:
    for each in files:
        said = {key.rpartition(".")[2]: value for key, value in each.metadata.items() if key.startswith("quantize.imatrix.")}
        if said.get("file", "none") == "none":
            yield f"`{each.path.name}`: without an importance matrix; columns were weighed by the energy of their weights."
        else:
            yield (f"`{each.path.name}`: importance matrix `{said['file']}`, collected over {said.get('dataset', 'unknown')} "
                   f"({said.get('chunks_count', 0)} chunks, {said.get('entries_count', 0)} tensors).")


def _running(file: Described) -> str:
    return RUNNING.format(name=file.path.name)


def _license(metadata: Mapping[str, Any], repo: str | None) -> str:
    name = metadata.get("general.license")
    if name:
        return f"{str(name).upper()}, as the model that it was made from."
    return f"That of the model it was made from{f', see {HUB}{repo}' if repo else ''}."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headings, rule, *rows))


def _weights(info: TensorInfo) -> int:
    found = 1
    for size in info.shape:
        found *= size
    return found
