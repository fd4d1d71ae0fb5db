"""Answers as markdown that arrives in pieces: which blocks are finished, and how a block is drawn.

A finished block is drawn once and stays in the scrollback; only the block that is still growing is drawn again.
"""

from __future__ import annotations

import re
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment

FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def split(text: str) -> tuple[str, str]:
    """(finished blocks, rest). A block ends at a blank line outside a code fence when an unindented line follows it.

    (An indented line may belong to the list item above.) The rest begins with the block that may still grow.
    """
    border, position, fence, blank = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        if blank and not fence and line.strip() and not line[0].isspace():
            border = position
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not line[mark.end():].strip():
            fence = ""
        blank = not line.strip()
        position += len(line)
    return text[:border], text[border:]


class _LeftHeading(Heading):
    """rich centres headings and frames the largest; in a conversation they are just bold lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class Block:
    """A piece of an answer, drawn as markdown without blank lines around it (rich puts them around lists and code)."""

    def __init__(self, text: str) -> None:
        self._content = _Markdown(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options, pad=False)
        inked = [index for index, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        for line in lines[inked[0]:inked[-1] + 1] if inked else ():
            yield from line
            yield Segment.line()


class _Markdown(Markdown):
    """Markdown as people write it to each other: line ends stay, and HTML is text (`vector<int>` must not vanish)."""

    elements = {**Markdown.elements, "heading_open": _LeftHeading}  # noqa: RUF012 - rich's own declaration

    def __init__(self, text: str) -> None:
        super().__init__(text, code_theme="ansi_dark", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
        self.parsed = [_keep_line_ends(token) for token in parser.parse(text)]


def _keep_line_ends(token: Any) -> Any:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token
