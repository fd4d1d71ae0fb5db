"""The model card and the figures in a file's header: said by the header, found again by whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_quant import report
from dsv4_quant.errors import CorruptFile, WrongUse
from dsv4_quant.files import gguf_header, gguf_writer
from dsv4_quant.files.gguf_writer import Entry, Place
from dsv4_quant.metadata import QUALITY, QUALITY_BYTES
from dsv4_quant.report import Described, demand_room, model_card, record, write_card

FIGURES = {"window": 512, "tokens": 6431, "perplexity": 7.123456789, "reference_perplexity": 7.0, "kl": 0.0123456789,
           "kl_error": 0.0004, "kl_p99": 0.25, "top1": 0.9512}
MEASURED = {"reference": "flash", "text": "the evaluation text of dsv4", "numerics": "official",
            "contexts": [FIGURES, {**FIGURES, "window": 2048, "kl": 0.01}]}
KEYS = {"general.name": "DeepSeek-V4-Flash", "general.license": "mit", "dsv4.recipe": "q2 --down q3_k",
        "general.base_model.0.repo_url": "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash",
        "general.base_model.0.version": "60d8d70"}


def made(path: Path, keys: dict[str, Any] | None = None, *, room: int = QUALITY_BYTES, experts: str = "iq2_xxs",
         split: tuple[int, int] | None = None) -> Path:
    """A file of a few tensors as dsv4 quantize leaves them, zeros for data."""
    entries = [Entry(key, "str", value) for key, value in (KEYS if keys is None else keys).items()]
    entries += [Entry(QUALITY, "str", " " * room)] if room else []
    if split:
        entries += [Entry("split.no", "u16", split[0]), Entry("split.count", "u16", split[1])]
    number = split[0] if split else 0
    shapes = [(f"blk.{number}.ffn_gate_exps.weight", (4, 8, 256), experts), (f"blk.{number}.attn_kv.weight", (16, 256), "q8_0"),
              (f"blk.{number}.attn_norm.weight", (256,), "f32")]
    places, offset = [], 0
    for name, shape, kind in shapes:
        places.append(Place(name, shape, kind, offset))
        rows = 1
        for size in shape[:-1]:
            rows *= size
        offset += gguf_writer.aligned(rows * gguf_writer.row_bytes(kind, shape[-1]))
    path.write_bytes(gguf_writer.header(entries, places) + bytes(offset))
    return path


def test_figures_go_into_the_header_and_nothing_else_moves(tmp_path: Path) -> None:
    path = made(tmp_path / "a.gguf")
    before, size = gguf_header.read(path), path.stat().st_size
    assert Described.of(path).quality is None
    for measured in (MEASURED, {**MEASURED, "text": "short", "contexts": [FIGURES]}):  # the second over the longer first
        record(path, measured)
        found = Described.of(path).quality
        assert found is not None
        assert found["text"] == measured["text"]
        assert len(found["contexts"]) == len(measured["contexts"])
        assert found["contexts"][0]["perplexity"] == 7.1234568
    after = gguf_header.read(path)
    assert (after.tensors, path.stat().st_size) == (before.tensors, size)
    assert {**after.metadata, QUALITY: ""} == {**before.metadata, QUALITY: ""}


def test_a_file_without_room(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=f"has no key {QUALITY}"):
        record(made(tmp_path / "a.gguf", room=0), MEASURED)
    with pytest.raises(WrongUse, match="has room for 40 bytes"):
        record(made(tmp_path / "b.gguf", room=40), MEASURED)


def test_room_is_asked_for_before_anything_is_measured(tmp_path: Path) -> None:
    demand_room(made(tmp_path / "a.gguf"))
    with pytest.raises(WrongUse, match=f"has no key {QUALITY}"):
        demand_room(made(tmp_path / "b.gguf", room=0))


def test_the_card_says_what_the_header_says(tmp_path: Path) -> None:
    path = made(tmp_path / "flash-q2.gguf", {**KEYS, "quantize.imatrix.file": "flash.imatrix.gguf",
                                             "quantize.imatrix.dataset": "dsv4 calibration set"})
    record(path, MEASURED)
    card = write_card(path)
    assert card == tmp_path / "README.md"
    text = card.read_text(encoding="utf-8")
    for line in (
        "license: mit", "base_model: deepseek-ai/DeepSeek-V4-Flash", "# DeepSeek-V4-Flash, quantised",
        "[deepseek-ai/DeepSeek-V4-Flash](https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash) at revision `60d8d70`",
        f"| `flash-q2.gguf` | q2 --down q3_k | {path.stat().st_size / 1000:.1f} KB | 4.78 |",
        "| `flash-q2.gguf` | 512 | 7.1235 | 7.0000 | 0.01235 ± 0.00040 | 0.2500 | 95.12% |",
        "| `flash-q2.gguf` | 2,048 | 7.1235 | 7.0000 | 0.01000 ± 0.00040 | 0.2500 | 95.12% |",
        "Measured over 6,431 tokens of the evaluation text of dsv4, against flash.",
        "| attention | q8_0 | 4.4 KB |", "| routed experts, gate and up | iq2_xxs | 2.1 KB |",
        "`flash-q2.gguf`: importance matrix `flash.imatrix.gguf`, collected over dsv4 calibration set",
        "dsv4 chat ./flash-q2.gguf", "llama-server -m flash-q2.gguf --jinja", "MIT, as the model that it was made from.",
    ):  # fmt: skip
        assert line in text, line
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "flash-q2.gguf"]


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    text = model_card([Described.of(made(tmp_path / "a.gguf", {"dsv4.recipe": "q4"}))])
    assert "a checkpoint whose origin was not recorded" in text
    assert "Not measured." in text
    assert "without an importance matrix; columns were weighed by the energy of their weights" in text
    assert "That of the model it was made from." in text
    assert "base_model" not in text
    assert "license:" not in text
    assert "None" not in text


def test_one_card_for_all_files_of_a_folder(tmp_path: Path) -> None:
    made(tmp_path / "b-q4.gguf", experts="q8_0")
    made(tmp_path / "else.gguf", {"general.name": "not ours"})
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.gguf").write_text("no header at all, but long enough")
    for _ in range(2):  # the second over the first
        text = write_card(made(tmp_path / "a-q2.gguf")).read_text(encoding="utf-8")
        table = [line for line in text.splitlines() if line.startswith("| `")]
        assert [line.split("`")[1] for line in table] == ["a-q2.gguf", "b-q4.gguf"]


def test_a_split_file_is_one_file(tmp_path: Path) -> None:
    paths = [made(tmp_path / f"a-{number + 1:05d}-of-00002.gguf", split=(number, 2)) for number in range(2)]
    described = Described.of(paths[0])
    assert (described.parts, len(described.tensors)) == (2, 6)
    assert described.nbytes == sum(path.stat().st_size for path in paths)
    text = write_card(paths[0]).read_text(encoding="utf-8")
    assert "| `a-00001-of-00002.gguf` and 1 more |" in text
    assert text.count("a-00002-of-00002.gguf") == 0


def test_somebody_s_own_readme_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    card = write_card(made(tmp_path / "a.gguf"))
    assert card == tmp_path / "a.README.md"
    assert report.MARK in card.read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_no_card_for_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"nothing" * 9)
    with pytest.raises(CorruptFile):
        write_card(tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_nonsensical_figure_is_no_figure(tmp_path: Path) -> None:
    for text in ("[1]", '{"contexts": 3}', "{", json.dumps("a")):
        path = made(tmp_path / "a.gguf")
        gguf_writer.fill_text(path, QUALITY, text)
        assert Described.of(path).quality is None
