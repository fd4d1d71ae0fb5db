from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv4_kernels import tuned
from dsv4_kernels.unpack import LAYOUTS
from tests.kernels.interpreter import QUIET, of
from tools import tune
from tools.random_weights import packed

pytestmark = QUIET

of("linear")
FEW = dict(tuned.default("linear.few"))
GOOD, BAD, SLOW = ({**FEW, "warps": warps} for warps in (8, 2, 1))


def test_all_kernels_are_tried_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--formats", "q8_0"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0].removeprefix("| ").partition(":")[0] for row in rows} == tune.CANDIDATES.keys()
    assert all(row[-1] == "0 |" for row in rows)  # every candidate computed the same


def test_what_cannot_be_done_here_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned.TABLE.read_text()
    assert tune.main(["--write"]) == 2
    assert "interpreter are not written" in capsys.readouterr().err
    assert tune.main(["--only", "soup"]) == 2
    monkeypatch.setattr("dsv4_kernels.gpu.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    told = capsys.readouterr()
    assert "no card" in told.err
    assert told.out == ""
    assert tuned.TABLE.read_text() == before


def test_candidates_know_their_kernels() -> None:
    for kernel in tune.CANDIDATES:
        found = tune.candidates(kernel)
        assert found
        assert all(sizes.keys() == tuned.default(kernel).keys() for sizes in found)
        assert tuned.default(kernel) not in found
    assert tune.CANDIDATES.keys() == tuned.read()[tuned.DEFAULT].keys()


def trial(times: dict[int, float]) -> tuple[tune.Trial, Callable[[tune.Run], float]]:
    """A kernel whose time depends on its warps, and that computes nonsense with BAD sizes."""
    def warps() -> int:
        return tuned.tuned("linear.few", torch.device("cpu"))["warps"]

    def run() -> Tensor:
        return torch.full((3,), float("nan") if warps() == BAD["warps"] else 1.0)

    return tune.Trial("linear.few", "q8_0", run), lambda run: times[warps()]


def test_the_quickest_right_one_is_kept() -> None:
    each, timed = trial({4: 1.0, 8: 0.5, 2: 0.1, 1: 2.0})
    found = tune.verdict(each, timed, [SLOW, BAD, GOOD])
    assert found == tune.Verdict("linear.few:q8_0", 1.0, 0.5, GOOD, 1)
    assert found.worthwhile


def test_a_hair_quicker_is_not_worth_a_row() -> None:
    each, timed = trial({4: 1.0, 8: 0.95, 2: 0.1, 1: 2.0})
    assert not tune.verdict(each, timed, [SLOW, BAD, GOOD]).worthwhile


def test_errors_of_the_default_are_no_candidates_fault() -> None:
    def fails() -> Tensor:
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tune.verdict(tune.Trial("linear.few", "", fails), tune.by_clock, [])
    with pytest.raises(RuntimeError, match="illegal"):
        tune._result(fails)


def test_rows_are_written_and_others_stay(tmp_path: Path) -> None:
    table = tmp_path / "tuned.toml"
    table.write_text(tuned.TABLE.read_text() + '\n[sm_90]\n# old\n"linear.few:q8_0" = {rows = 1, lanes = 64, warps = 1, '
                     'stages = 0}\n"linear.few:q4_k" = {rows = 2, lanes = 64, warps = 1, stages = 0}\n'
                     '"linear.few:bf16" = {rows = 2, lanes = 64, warps = 1, stages = 0}\n')
    found = [tune.Verdict("linear.few:q8_0", 1.0, 0.5, GOOD, 0), tune.Verdict("linear.few:bf16", 1.0, 1.0, FEW, 0)]
    tune.save(table, found, "sm_90", "some card")
    rows = tuned.read(table)
    assert rows["sm_90"] == {"linear.few:q8_0": GOOD, "linear.few:q4_k": {"rows": 2, "lanes": 64, "warps": 1, "stages": 0}}
    assert {key: rows[key] for key in tuned.read()} == tuned.read()
    text = table.read_text()
    assert text.startswith(tuned.TABLE.read_text().rstrip())
    assert "# old" not in text
    assert "# some card, Triton" in text
    tune.save(table, found, "sm_90", "some card")
    assert table.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.toml"]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_random_weights_keep_a_products_size(name: str) -> None:
    random = torch.Generator().manual_seed(3)
    weight = packed(name, 300, 512, random)
    values = weight.float()
    assert values.shape == (300, 512)
    assert values.isfinite().all()
    assert 0.7 < float((torch.randn(20, 512, generator=random) @ values.T).std()) < 1.3
    assert len(values.unique(dim=0)) > 8  # rows differ
    with pytest.raises(ValueError, match=r"no whole number|no encoder"):
        packed("q4_k", 3, 100, random)
