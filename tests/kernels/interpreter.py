"""Tests of the Triton kernels run them in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import pytest


def of(op: str) -> ModuleType:
    """The `gpu` module of an operation, interpreted. Kernels that were imported before stay as they were: call it first."""
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")
    return import_module(f"dsv4_kernels.{op}.gpu")


# The interpreter computes with numpy, which warns of infinities and of what is no number; a card makes them without a word.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")
