"""Sizes of the Triton kernels' tiles on the card at hand: `tuned.toml`, whose rows `python -m tools.tune --write` measures.

All are powers of two. Every kernel has `warps` and `stages` (of its loops' loads; 0 leaves them to Triton), and beside them:

    rows, lanes            of a matrix, of a program for few tokens; a format's fields share the lanes
    tokens, rows, columns  of a program for many tokens; formats of several fields have half the columns
    keys, programs         attention: keys of a tile, and programs that keep the card busy
    keys, tokens; scan     indexer: entries and tokens of a program; scores that are looked at together when choosing
    tokens                 sampling: of the vocabulary, in a program; all programs' sums are looked at together
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("tuned.toml")
DEFAULT, INTERPRETER, AMD = "default", "interpreter", "gfx"
Sizes: TypeAlias = Mapping[str, int]
Rows: TypeAlias = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel, or "kernel:format" -> sizes


def read(path: Path = TABLE) -> Rows:
    return parsed(path.read_text(encoding="utf-8"))


def parsed(text: str) -> Rows:
    return tomllib.loads(text)


@cache
def default(kernel: str) -> Sizes:
    """What was chosen by reasoning. Raises KeyError for a kernel that has no such sizes."""
    return _rows()[DEFAULT][kernel]


@cache
def tuned(kernel: str, device: torch.device, name: str = "") -> Sizes:
    """The sizes of a kernel on this device, for matrices of format `name`: those measured for it, or for any format, or the
    default ones. Raises KeyError for a kernel that has none."""
    return _forced[kernel] if kernel in _forced else sized(kernel, architecture(device), name)


def sized(kernel: str, architecture: str, name: str = "") -> Sizes:
    """The same of an architecture; AMD's have rows in common behind their own."""
    known = [_rows().get(architecture, {}), _rows().get(AMD, {}) if architecture.startswith(AMD) else {}]
    return next((rows[key] for rows in known for key in (f"{kernel}:{name}", kernel) if key in rows), default(kernel))


def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942"; the interpreter's for the CPU, for nothing else brings tensors there to these kernels."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def options(sizes: Sizes) -> dict[str, int]:
    """How a kernel is to be launched."""
    return {"num_warps": sizes["warps"], **({"num_stages": sizes["stages"]} if sizes["stages"] else {})}


@contextmanager
def instead(kernel: str, sizes: Sizes) -> Iterator[None]:
    """While this lasts, the kernel has these sizes for every format, and on every device."""
    if sizes.keys() != default(kernel).keys():
        raise ValueError(f"{kernel} has {', '.join(default(kernel))}, not {', '.join(sizes)}")
    known = dict(_forced)
    _forced[kernel] = sizes
    tuned.cache_clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(known)
        tuned.cache_clear()


_forced: dict[str, Sizes] = {}


@cache
def _rows() -> Rows:
    return read()
