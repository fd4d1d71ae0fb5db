from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsv4_kernels.linear import linear
from dsv4_kernels.router import ref
from dsv4_quant.formats import Packed, q8_0
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("router")

TOKENS = [1, 7]
SIZES = [(1, 1, 1), (4, 7, 2), (13, 64, 6), (64, 515, 6), (256, 96, 8), (5, 3, 5)]  # experts, values, k
SCALE = 1.5


def score(logits: Tensor) -> Tensor:
    return functional.softplus(logits.double()).sqrt()


def drawn(t: int, n: int, d: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, a gate whose logits are of ordinary size, and a bias."""
    return (torch.randn(t, d, generator=random), torch.randn(n, d, generator=random) * (3 * d ** -0.5),
            torch.randn(n, generator=random))


def check(weights: Tensor, experts: Tensor, scores: Tensor) -> None:
    """Weights are the chosen scores over their sum."""
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    chosen = scores.gather(1, experts)
    assert_close(weights, chosen / chosen.sum(-1, keepdim=True) * SCALE)


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_learned_routes_equal_the_reference(t: int, n: int, d: int, k: int, random: torch.Generator) -> None:
    x, gate, bias = drawn(t, n, d, random)
    weights, experts = gpu.route_learned(x, gate, bias, k, SCALE)
    scores = score(x.double() @ gate.double().T)
    check(weights, experts, scores)
    keys = scores + bias
    assert (keys.gather(1, experts) - keys.topk(k).values).abs().max() < 1e-5  # the best, greatest first


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_hashed_routes_equal_the_reference(t: int, n: int, d: int, k: int, random: torch.Generator) -> None:
    x, gate, _ = drawn(t, n, d, random)
    table = torch.rand(29, n, generator=random).argsort(1)[:, :k]
    ids = torch.randint(0, 29, (t,), generator=random)
    weights, experts = gpu.route_by_hash(x, gate, table, ids, SCALE)
    assert torch.equal(experts, table[ids])
    check(weights, experts, score(x.double() @ gate.double().T))


@pytest.mark.parametrize("name", ["bf16", "q8_0"])
@pytest.mark.parametrize("t", [1, 2, 40])
def test_packed_gates_are_multiplied_as_everywhere(name: str, t: int, random: torch.Generator) -> None:
    x, gate, bias = drawn(t, 24, 96, random)
    packed = Packed(name, (24, 96), q8_0.encode(gate) if name == "q8_0" else gate.to(torch.bfloat16))
    scores = score(linear(x, packed))
    check(*gpu.route_learned(x, packed, bias, 6, SCALE), scores)
    table = torch.rand(9, 24, generator=random).argsort(1)[:, :6]
    check(*gpu.route_by_hash(x, packed, table, torch.arange(t) % 9, SCALE), scores)


def test_equal_scores_go_to_the_lower_number() -> None:
    gate, bias = torch.ones(20, 4), torch.zeros(20)
    bias[[3, 17]], bias[11] = 1.0, 2.0
    _, experts = gpu.route_learned(torch.ones(2, 4), gate, bias, 5, SCALE)
    assert experts.tolist() == [[11, 3, 17, 0, 1]] * 2


@pytest.mark.parametrize("logit", [-60.0, -20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 19.0, 21.0, 90.0, 1000.0])
def test_scores_of_any_size(logit: float) -> None:
    gate = torch.tensor([[logit], [0.5 * logit], [0.3]])
    weights, experts = gpu.route_learned(torch.ones(1, 1), gate, torch.zeros(3), 3, SCALE)
    scores = score(gate.T)
    for weight, expert in zip(weights[0], experts[0], strict=True):
        assert float(weight) == pytest.approx(float(scores[0, expert] / scores.sum() * SCALE), rel=1e-6)


def test_no_number_chooses_experts_that_exist(random: torch.Generator) -> None:
    x, gate, bias = drawn(3, 16, 8, random)
    x[1] = float("nan")
    weights, experts = gpu.route_learned(x, gate, bias, 4, SCALE)
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    assert ((experts >= 0) & (experts < 16)).all()


@pytest.mark.parametrize(("ids", "expert"), [([0, 7], 0), ([0, -1], 0), ([0, 1], 4), ([0, 1], -1)])
def test_ids_and_experts_outside_give_no_number(ids: list[int], expert: int) -> None:
    table = torch.zeros(7, 1, dtype=torch.int64)
    table[1] = expert
    weights, experts = gpu.route_by_hash(torch.zeros(2, 3), torch.zeros(4, 3), table, torch.tensor(ids), SCALE)
    assert weights.isnan().tolist() == [[False], [True]]
    assert ((experts >= 0) & (experts < 4)).all()


def test_views_and_nothing(random: torch.Generator) -> None:
    x, gate, bias = torch.randn(6, 16, generator=random), torch.randn(10, 32, generator=random), torch.randn(10, generator=random)
    view, part = x[::2, 4:12], gate[::2, 8:16]
    same = gpu.route_learned(view.clone(), part.clone(), bias[::2].clone(), 2, SCALE)
    for found, expected in zip(gpu.route_learned(view, part, bias[::2], 2, SCALE), same, strict=True):
        assert torch.equal(found, expected)
    assert [each.shape for each in gpu.route_learned(view[:0], part, bias[::2], 2, SCALE)] == [(0, 2), (0, 2)]
    table = torch.zeros(3, 2, dtype=torch.int64)
    empty = gpu.route_by_hash(view[:0], part, table, torch.zeros(0, dtype=torch.int64), SCALE)
    assert [each.shape for each in empty] == [(0, 2), (0, 2)]


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    x, gate, bias = (each.double() for each in drawn(3, 8, 5, random))
    pair = (each.route_learned(x, gate, bias, 2, SCALE) for each in (gpu, ref))
    for found, expected in zip(*pair, strict=True):
        assert torch.equal(found, expected)
    table, ids = torch.tensor([[0, 1], [5, 3]]), torch.tensor([1, 0, 1])
    expected = ref.route_by_hash(x, gate, table, ids, SCALE)
    for found, wanted in zip(gpu.route_by_hash(x, gate, table, ids, SCALE), expected, strict=True):
        assert torch.equal(found, wanted)
    narrow = gpu.route_by_hash(x.float(), gate.float(), table.int(), ids, SCALE)
    assert torch.equal(narrow[1], expected[1].int())
