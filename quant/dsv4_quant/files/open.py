"""From a path to a Source."""

from __future__ import annotations

from pathlib import Path

from dsv4_quant.files.gguf import GgufSource
from dsv4_quant.files.headers import read_header
from dsv4_quant.files.official import OfficialSource
from dsv4_quant.files.source import Source


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint folder or a GGUF (of a split one, the first part), and checks that nothing is missing.

    Raises CorruptFile for files that are missing, damaged or contradict their configuration, UnsupportedModel for
    other architectures.
    """
    header = read_header(path)
    return GgufSource(header) if header.layout == "gguf" else OfficialSource(header)
