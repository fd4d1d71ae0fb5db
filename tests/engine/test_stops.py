"""Stop strings: however the stream is cut, the same text comes through, and none of it is part of a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4cli.engine.stops import StopStrings
from dsv4cli.errors import UsageError

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(deadline=None)  # a busy machine is no bug
@given(text=TEXT, cuts=st.lists(st.integers(0, 30)), strings=STOPS)
def test_any_cut_gives_the_text_before_the_first_completed_stop(text: str, cuts: list[int], strings: list[str]) -> None:
    stops = StopStrings(strings)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    shown = "".join(stops.push(text[a:b]) for a, b in pairwise(borders)) + stops.flush()
    seen = next((text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in strings)), None)
    assert stops.hit == (seen is not None)
    assert shown == (text if seen is None else seen[:min(seen.find(s) for s in strings if s in seen)])


def test_text_is_held_only_while_in_doubt() -> None:
    stops = StopStrings(["END"])
    assert [stops.push(piece) for piece in ("one E", "N", "x EN", "D rest", "more")] == ["one ", "", "ENx ", "", ""]
    assert stops.hit
    assert stops.flush() == ""


def test_what_was_held_comes_out_at_the_end() -> None:
    stops = StopStrings(["END"])
    assert stops.push("the EN") == "the "
    assert stops.flush() == "EN"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["ok", ""])
