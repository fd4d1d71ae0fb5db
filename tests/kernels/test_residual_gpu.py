from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_kernels.hyper import HyperSettings, Mixer, mix_streams
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.residual import Joined, Residual, experts_into_streams, project_into_streams, ref
from dsv4_kernels.router import Router
from dsv4_quant.formats import Packed
from tests.kernels.interpreter import QUIET, of
from tests.kernels.test_linear_native import made
from tests.support.tolerance import RELATIVE, assert_close

pytestmark = QUIET

gpu = of("residual")

LIMIT = 1.5
SETTINGS = HyperSettings(1e-6, 1e-6, 5)
FEW = 5e-6  # sums of a few hundred products in another order


def drawn(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random)


def residual_of(t: int, s: int, d: int, random: torch.Generator) -> tuple[Residual, Mixer]:
    """And the mixer that reads the new streams."""
    m = (2 + s) * s
    mixer = Mixer(drawn(random, m, s * d) * (s * d) ** -0.5, drawn(random, m), drawn(random, 3) + 1)
    return Residual(drawn(random, t, s, d), drawn(random, t, s), drawn(random, t, s, s), mixer.fn), mixer


def wide(residual: Residual) -> Residual:
    return Residual(*(part.double() for part in residual))


def check(found: Joined, expected: Tensor, mixer: Mixer, tolerance: float, *, summed: bool) -> None:
    """The streams; and the sums are what the next mixer would have made of them itself."""
    assert_close(found.streams, expected.float(), tolerance)
    assert (found.sums is not None) == summed
    norm = torch.ones(expected.shape[2])
    for part, whole in zip(mix_streams(found.streams, mixer, SETTINGS, norm, found.sums),
                           mix_streams(found.streams, mixer, SETTINGS, norm), strict=True):
        assert_close(part, whole, 5e-6)


@pytest.mark.parametrize(("name", "s", "d", "tokens"), [
    ("q8_0", 4, 67, 1), ("q8_0", 4, 67, 3), ("q8_0", 4, 67, 8), ("q8_0", 4, 67, 9), ("fp8_e4m3", 4, 130, 1), ("q2_k", 3, 7, 2),
    ("f32", 1, 1, 1)])
def test_a_product_joins_the_streams(name: str, s: int, d: int, tokens: int, random: torch.Generator) -> None:
    """Rows that end within a tile, with any number of streams."""
    weight, (residual, mixer) = made(name, d, 256, random), residual_of(tokens, s, d, random)
    x = drawn(random, tokens, 256) / 16
    few = tokens <= 8
    check(project_into_streams(x, weight, residual), ref.project_into_streams(x.double(), weight, wide(residual)).streams, mixer,
          2e-5 if few else RELATIVE[torch.bfloat16], summed=few)


def experts_of(name: str, count: int, d: int, width: int, random: torch.Generator) -> Experts:
    return Experts(Expert(made(name, width, d, random), made(name, width, d, random), made(name, d, width, random))
                   for _ in range(count))


def router_of(count: int, d: int, k: int, hashed: bool, random: torch.Generator) -> Router:
    table = torch.rand(29, count, generator=random).argsort(1)[:, :k] if hashed else None
    return Router(drawn(random, count, d) * 3 * d ** -0.5, None if hashed else drawn(random, count), table, k, 1.5)


CASES = [  # routed and shared formats, streams, d, width, experts, k, by hash, tokens
    ("mxfp4", "q8_0", 4, 96, 64, 5, 2, False, 1), ("mxfp4", "q8_0", 4, 96, 64, 5, 2, False, 5),
    ("mxfp4", "q8_0", 4, 96, 64, 5, 2, False, 10), ("mxfp4", "q8_0", 4, 96, 64, 5, 3, True, 2),
    ("q2_k", "fp8_e4m3", 2, 256, 256, 3, 3, False, 1), ("f32", "iq2_xxs", 4, 256, 256, 1, 1, True, 3),
]


@pytest.mark.parametrize(("name", "other", "s", "d", "width", "count", "k", "hashed", "tokens"), CASES)
def test_experts_join_the_streams(name: str, other: str, s: int, d: int, width: int, count: int, k: int, hashed: bool,
                                  tokens: int, random: torch.Generator) -> None:
    shared, experts = experts_of(other, 1, d, width, random)[0], experts_of(name, count, d, width, random)
    router, (residual, mixer) = router_of(count, d, k, hashed, random), residual_of(tokens, s, d, random)
    x, ids = drawn(random, tokens, d), torch.arange(tokens) * 3
    high = router._replace(bias=None if router.bias is None else router.bias.double())
    expected = ref.experts_into_streams(x.double(), ids, high, shared, experts, LIMIT, wide(residual)).streams
    few = tokens <= 8
    check(experts_into_streams(x, ids, router, shared, experts, LIMIT, residual), expected, mixer,
          2e-5 if few else RELATIVE[torch.bfloat16], summed=few)


def test_equal_scores_go_to_the_lower_number_as_in_the_router_alone(random: torch.Generator) -> None:
    """Experts that answer apart, chosen by ties; the same bits however often it is asked."""
    experts = experts_of("q8_0", 7, 32, 32, random)
    router = Router(torch.zeros(7, 32), torch.tensor([0, 1.0, 0, 1, 2, 1, 0]), None, 3, 1.0)
    residual, _ = residual_of(2, 4, 32, random)
    x, ids = drawn(random, 2, 32), torch.zeros(2, dtype=torch.int64)
    found = experts_into_streams(x, ids, router, experts[0], experts, LIMIT, residual)
    shares = torch.full((2, 3), 1 / 3)
    out = gpu.routed_experts(x, shares, torch.tensor([[4, 1, 3]] * 2), experts, LIMIT, gpu.shared_expert(x, experts[0], LIMIT))
    assert_close(found.streams, gpu.spread_streams(out, *residual[:3]), FEW)
    again = experts_into_streams(x, ids, router, experts[0], experts, LIMIT, residual)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_what_is_no_number_and_what_no_table_has(random: torch.Generator) -> None:
    experts, router = experts_of("q8_0", 3, 32, 32, random), router_of(3, 32, 2, True, random)
    residual, _ = residual_of(4, 2, 32, random)
    x, ids = drawn(random, 4, 32), torch.tensor([0, 29, 1, -1])
    x[2, 5] = float("nan")
    found = experts_into_streams(x, ids, router, experts[0], experts, LIMIT, residual)
    assert found.sums is not None
    assert found.streams[0].isfinite().all()
    assert found.sums[0].isfinite().all()
    assert found.streams[1:].isnan().all()
    learned = experts_into_streams(x, ids, router_of(3, 32, 2, False, random), experts[0], experts, LIMIT, residual)
    assert learned.streams.isnan().flatten(1).all(1).tolist() == [False, False, True, False]


def test_what_has_no_kernel_takes_one_step_after_the_other(random: torch.Generator) -> None:
    residual, _ = residual_of(2, 2, 256, random)
    x, ids = drawn(random, 2, 256), torch.zeros(2, dtype=torch.int64)
    weight = made("iq3_xxs", 256, 256, random)
    assert torch.equal(project_into_streams(x, weight, residual).streams, ref.project_into_streams(x, weight, residual).streams)
    router, experts = router_of(2, 256, 1, False, random), experts_of("iq3_xxs", 2, 256, 256, random)
    found = experts_into_streams(x, ids, router, experts[0], experts, LIMIT, residual)
    assert found.sums is None
    assert_close(found.streams, ref.experts_into_streams(x, ids, router, experts[0], experts, LIMIT, residual).streams, FEW)


def test_exact_weights_and_views(random: torch.Generator) -> None:
    weight = replace(made("q8_0", 32, 64, random), exact=True)
    residual, _ = residual_of(3, 4, 64, random)
    view = Residual(residual.streams[..., ::2], residual.post, residual.across.mT, residual.fn[:, ::2])
    x = drawn(random, 64, 3).T
    assert isinstance(weight, Packed)
    found, same = (project_into_streams(x.contiguous(), weight, each)
                   for each in (view, Residual(*(part.contiguous() for part in view))))
    assert all(torch.equal(*pair) for pair in zip(found, same, strict=True))
    assert torch.equal(project_into_streams(x, weight, view).streams, found.streams)
