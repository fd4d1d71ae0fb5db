"""Tests of the CPU's own kernels run on every way they can be compiled here."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import pytest

from dsv4_kernels.native import build, library

ON_X86 = platform.machine() in ("x86_64", "AMD64")
VARIANTS = ["native", "portable", *(["avx2"] if ON_X86 else [])]


@cache
def opened(folder: Path, variant: str) -> ctypes.CDLL:
    return library.open_library(build.library_path(folder, variant))


@pytest.fixture(params=VARIANTS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, native_folder: Path) -> str:
    """The name of the variant that every door computes with during the test."""
    try:
        found = opened(native_folder, request.param)
    except build.BuildError as error:
        if "compiler" not in error.message:
            raise
        pytest.skip(error.message)
    monkeypatch.setattr(library, "_library", found)
    return str(request.param)
