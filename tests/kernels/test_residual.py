from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.residual import Residual, experts_into_streams, project_into_streams
from dsv4_kernels.router import Router
from tests.support.tolerance import assert_close

T, S, D, K = 3, 4, 8, 2


def drawn(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64)


def residual_of(random: torch.Generator) -> Residual:
    return Residual(drawn(random, T, S, D), drawn(random, T, S), drawn(random, T, S, S), drawn(random, 24, S * D))


def joined(out: Tensor, residual: Residual) -> Tensor:
    streams, post, across, _ = residual
    return post[:, :, None] * out[:, None] + torch.einsum("tjk,tjd->tkd", across, streams)


def test_a_product_joins_the_streams(random: torch.Generator) -> None:
    residual, x, weight = residual_of(random), drawn(random, T, 5), drawn(random, D, 5)
    found = project_into_streams(x, weight, residual)
    assert_close(found.streams, joined(x @ weight.T, residual))
    assert found.sums is None


def test_experts_join_the_streams(random: torch.Generator) -> None:
    residual, x = residual_of(random), drawn(random, T, D)
    experts = Experts(Expert(drawn(random, 6, D), drawn(random, 6, D), drawn(random, D, 6)) for _ in range(5))
    table = torch.tensor([[0, 1], [1, 2], [3, 0]])
    router, ids = Router(drawn(random, 4, D), None, table, K, 1.5), torch.tensor([2, 0, 1])

    def one(expert: Expert, x: Tensor) -> Tensor:
        return (torch.nn.functional.silu((expert.w1 @ x).clamp(max=1.0)) * (expert.w3 @ x).clamp(-1.0, 1.0)) @ expert.w2.T

    scores = torch.nn.functional.softplus(x @ router.gate.T).sqrt()
    out = []
    for row, score, id in zip(x, scores, ids, strict=True):
        shares = 1.5 * score[table[id]] / score[table[id]].sum()
        parts = [share * one(experts[int(number)], row) for number, share in zip(table[id], shares, strict=True)]
        out.append(one(experts[4], row) + sum(parts))
    assert_close(experts_into_streams(x, ids, router, experts[4], experts[:4], 1.0, residual).streams,
                 joined(torch.stack(out), residual))


@pytest.mark.parametrize(("field", "shape"), [
    ("post", (T, S + 1)), ("across", (T, S, 1)), ("fn", (24, D)), ("streams", (T + 1, S, D))])
def test_what_does_not_fit_is_refused(field: str, shape: tuple[int, ...], random: torch.Generator) -> None:
    residual = residual_of(random)._replace(**{field: torch.zeros(shape)})
    with pytest.raises(ValueError, match=str(shape[-1])):
        project_into_streams(drawn(random, T, 5), drawn(random, D, 5), residual)
