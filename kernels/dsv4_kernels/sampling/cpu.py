"""On the CPU sampling is torch's: a few passes over the vocabulary, once a token."""

from __future__ import annotations

from dsv4_kernels.sampling.ref import sample

__all__ = ["sample"]
