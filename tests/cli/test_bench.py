"""`dsv4 bench`: what it prints. The rates themselves are nobody's promise here."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from dsv4cli import console
from dsv4cli.commands import bench
from dsv4cli.engine.bench import Row
from tests.support.program import Outcome

Run = Callable[..., Outcome]
SMALL = ("--prompt", "40", "--gen", "3", "--repeat", "1")


def test_rows_for_programs(run_dsv4: Run) -> None:
    done = run_dsv4("bench", "tiny", *SMALL, "--depth", "0,150", "--json", "--threads", "1")
    assert done.code == 0, done.err
    first, second = json.loads(done.out)
    assert list(first) == ["prompt_tokens", "gen_tokens", "depth", "prompt_tok_s", "decode_tok_s", "bytes_per_token",
                           "bandwidth_gb_s", "bound_tok_s"]
    assert (first["prompt_tokens"], first["gen_tokens"], first["depth"], second["depth"]) == (40, 3, 0, 150)
    assert first["prompt_tok_s"] > 0
    assert first["decode_tok_s"] > 0
    assert first["bound_tok_s"] == pytest.approx(first["bandwidth_gb_s"] * 1e9 / first["bytes_per_token"])
    assert second["bytes_per_token"] > first["bytes_per_token"]  # there are caches to read


def test_a_table_for_people(run_dsv4: Run) -> None:
    done = run_dsv4("bench", "tiny", "--prompt", "0", "--gen", "2", "--repeat", "1")
    heading, row = done.out.splitlines()
    assert heading.split()[:3] == ["depth", "prompt", "decode"]
    assert row.split()[:2] == ["0", "-"]
    assert row.split()[3] == "tok/s"


def test_a_row_of_a_large_machine_fits_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(512, 64, 16_384, 345.6, 23.4, 12_345_678_901, 350.1, 28.4)
    console.table(bench.HEADINGS, [bench._in_words(row)], right=range(7))
    heading, shown = capsys.readouterr().out.splitlines()
    assert max(len(heading), len(shown)) <= 80
    assert "345.6 tok/s" in shown


@pytest.mark.parametrize(("options", "word"), [
    (("--depth", "x"), "--depth is 'x'"), (("--depth", "1,-2"), "--depth is '1,-2'"),
    (("--prompt", "0", "--gen", "0"), "nothing to measure"), (("--gen", "-1"), "--gen is -1"),
    (("--repeat", "0"), "--repeat is 0"), (("--depth", "9999999"), "do not fit"),
])
def test_numbers_that_cannot_be_measured(options: tuple[str, ...], word: str, run_dsv4: Run) -> None:
    done = run_dsv4("bench", "tiny", *options)
    assert done.code == 2
    assert word in done.err
    assert "hint:" in done.err
