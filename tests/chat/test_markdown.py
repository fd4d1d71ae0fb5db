"""Blocks that arrive in pieces, and how a block looks."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv4cli.chat import markdown


def drawn(text: str, width: int = 40) -> str:
    """As plain text, without blanks at line ends."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(markdown.Block(text))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


@pytest.mark.parametrize(("text", "finished"), [
    ("one line", ""),
    ("one\n\n", ""),  # the next line might be indented and belong to a list
    ("one\n\ntwo", "one\n\n"),
    ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
    ("- a\n\n  more of a\n\nb", "- a\n\n  more of a\n\n"),
    ("```\na\n\nb", ""),
    ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
    ("````\n```\n\nstill code", ""),
    ("~~~\n```\n\nstill code\n~~~\n\nx", "~~~\n```\n\nstill code\n~~~\n\n"),
])
def test_split(text: str, finished: str) -> None:
    assert markdown.split(text) == (finished, text[len(finished):])


@given(st.lists(st.sampled_from(["a", "b c", " ", "\n", "\n\n", "```", "- ", "  "]), max_size=30))
def test_cutting_the_stream_anywhere_finishes_the_same_blocks(pieces: list[str]) -> None:
    """A border, once found, stays: what was printed for good is a prefix of what the whole text would print."""
    text = "".join(pieces)
    printed, rest = "", ""
    for letter in text:
        done, rest = markdown.split(rest + letter)
        printed += done
    assert printed + rest == text
    assert markdown.split(text)[0].startswith(printed) or printed.startswith(markdown.split(text)[0])


def test_nothing_that_looks_like_html_vanishes() -> None:
    assert drawn("std::vector<int> and <b>bold</b> <!-- note -->") == "std::vector<int> and <b>bold</b> <!--\nnote -->"
    assert drawn("<tool>\nx\n</tool>") == "<tool>\nx\n</tool>"


def test_line_ends_stay() -> None:
    assert drawn("roses are red\nviolets are blue") == "roses are red\nviolets are blue"
    assert drawn('{"a": 1,\n"b": 2}') == '{"a": 1,\n"b": 2}'


def test_headings_lists_tables_and_code() -> None:
    assert drawn("# Title") == "Title"
    assert drawn("1. one\n2. two") == " 1 one\n 2 two"
    assert drawn("7. seven") == " 7 seven"
    assert "print(1)" in drawn("```python\nprint(1)\n```")
    assert "\n" not in drawn("```\nx\n```")  # no empty lines around
    assert [word for word in ("h", "i", "1", "2") if word in drawn("| h | i |\n|---|---|\n| 1 | 2 |")] == ["h", "i", "1", "2"]


def test_links_show_their_address() -> None:
    assert drawn("[docs](https://example.org/x)") == "docs (https://example.org/x)"


@pytest.mark.parametrize(("text", "shown"), [
    ("", ""), ("\n", ""), ("**", "**"),
    ("**bo", "**bo"), ("```", ""), ("[", "["), ("\\", "\\"), ("- a", " • a"), ("|", "|"), ("<", "<")])
def test_unfinished_pieces_can_be_drawn(text: str, shown: str) -> None:
    assert drawn(text) == shown
