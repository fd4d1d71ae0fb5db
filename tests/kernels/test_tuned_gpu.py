from __future__ import annotations

import re

import pytest
import torch

from dsv4_kernels import tuned
from dsv4_kernels.attention import Entries
from dsv4_kernels.attention import ref as attention
from dsv4_kernels.linear import linear
from dsv4_kernels.linear import ref as products
from dsv4_kernels.unpack import LAYOUTS
from tests.kernels.interpreter import QUIET, of
from tests.kernels.test_linear_native import made
from tests.support.tolerance import RELATIVE, assert_close
from tools.registers import TARGETS

pytestmark = QUIET

of("linear")
CPU = torch.device("cpu")


def test_every_row_is_of_a_known_kernel_and_whole() -> None:
    rows = tuned.read()
    for architecture, own in rows.items():
        assert architecture in (tuned.DEFAULT, tuned.INTERPRETER) or re.fullmatch(r"sm_\d+|gfx[0-9a-f]*", architecture)
        for key, sizes in own.items():
            kernel, colon, name = key.partition(":")
            assert sizes.keys() == rows[tuned.DEFAULT][kernel].keys(), f"{key} of {architecture}"
            assert name in LAYOUTS or not colon
            assert all(size > 0 and size & (size - 1) == 0 for knob, size in sizes.items() if knob != "stages"), key
            assert 0 <= sizes["stages"] <= 8
            assert sizes["warps"] <= 16
            assert all(sizes.get(side, 16) >= 16 for side in ("keys", "columns"))  # what tensor cores take


def test_an_architecture_says_only_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict(tuned.default("linear.few"))
    table = {"default": {"linear.few": few, "linear.many": dict(tuned.default("linear.many"))},
             "sm_90": {"linear.few": few | {"rows": 8}, "linear.few:q8_0": few | {"rows": 2}}}
    monkeypatch.setattr(tuned, "_rows", lambda: table)
    card = torch.device("cuda", 7)  # one that is nowhere, so that nothing is remembered of a real one
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90" if device == card else "sm_89")
    assert tuned.tuned("linear.few", card, "q8_0")["rows"] == 2
    assert tuned.tuned("linear.few", card, "bf16")["rows"] == 8
    assert tuned.tuned("linear.many", card, "q8_0") == tuned.default("linear.many")
    assert tuned.tuned("linear.few", torch.device("cuda", 6), "q8_0") == tuned.default("linear.few")
    with pytest.raises(KeyError):
        tuned.tuned("linear.soup", card)
    table |= {"gfx": {"linear.few": few | {"rows": 1}}, "gfx942": {"linear.few:q8_0": few | {"rows": 2}}}
    for name, rows in (("q8_0", 2), ("bf16", 1)):
        assert tuned.sized("linear.few", "gfx942", name)["rows"] == rows
    assert tuned.sized("linear.few", "gfx1100")["rows"] == 1
    assert tuned.sized("linear.many", "gfx942") == tuned.default("linear.many")
    tuned.tuned.cache_clear()


def test_the_architecture_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert tuned.architecture(torch.device("cuda", 0)) == "sm_120"
    assert tuned.architecture(CPU) == tuned.INTERPRETER
    assert {"sm_120", "gfx942"} <= TARGETS.keys()  # the names that the table of registers has


def test_launches_take_their_stages_from_triton_unless_told() -> None:
    assert tuned.options({"warps": 4, "stages": 0}) == {"num_warps": 4}
    assert tuned.options({"warps": 8, "stages": 2}) == {"num_warps": 8, "num_stages": 2}


@pytest.mark.parametrize(("kernel", "tokens", "sizes"), [
    ("linear.few", 2, {"rows": 2, "lanes": 64, "warps": 1, "stages": 1}),
    ("linear.many", 20, {"tokens": 16, "rows": 32, "columns": 128, "warps": 8, "stages": 2}),
])
def test_other_sizes_compute_the_same(kernel: str, tokens: int, sizes: dict[str, int], random: torch.Generator) -> None:
    weight, x = made("q4_k", 67, 512, random), torch.randn(tokens, 512, generator=random)
    with tuned.instead(kernel, sizes):
        assert tuned.tuned(kernel, CPU, "q4_k") == sizes
        found = linear(x, weight)
    assert tuned.tuned(kernel, CPU, "q4_k") != sizes
    assert_close(found, products.linear(x.double(), weight).float(), RELATIVE[torch.bfloat16])


def test_attention_in_wider_tiles_and_fewer_parts(random: torch.Generator) -> None:
    q, recent, sink = (torch.randn(*shape, generator=random) for shape in ((1, 4, 32), (40, 32), (4,)))
    entries = Entries(torch.randn(70, 32, generator=random).bfloat16(), torch.tensor([70]), None)
    recent = recent.bfloat16()
    with tuned.instead("attention.attend", {"keys": 64, "programs": 2, "warps": 2, "stages": 2}):
        found = of("attention").sparse_attention(q, recent, entries, sink, 16)
    wide = entries._replace(kv=entries.kv.double())
    assert_close(found, attention.sparse_attention(q.double(), recent.double(), wide, sink.double(), 16).float())


def test_sizes_that_a_kernel_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"linear\.few has rows, lanes, warps, stages"), \
            tuned.instead("linear.few", {"rows": 4}):
        pass
