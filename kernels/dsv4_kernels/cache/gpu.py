"""Keeping rows on the card: torch's own copy is one launch and rounds as it should, so there is nothing left to write."""

from __future__ import annotations

from dsv4_kernels.cache import ref

keep = ref.keep

AHEAD = ()
