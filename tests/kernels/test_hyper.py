from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.hyper import HyperSettings, Mixer, merge_streams, mix_streams, spread_streams
from tests.support.tolerance import assert_close

SETTINGS = HyperSettings(norm_eps=1e-6, eps=1e-6, rounds=20)

# spec/checkpoint.md section 3.6: m_i = sin(i), scale (0.5, 1, 2), base linspace(-1, 1, 24)
PRE = [.2689424, .3793510, .4081946, .3388180]
POST = [.3927912, .3577049, .6383019, 1.1320653]
ACROSS = [[.5623538, .3279494, .0826342, .0270610], [.0092542, .1160154, .6191952, .2555347],
          [.1123147, .0540297, .1403542, .6933011], [.3160762, .5020046, .1578154, .0241023]]


def published(dtype: torch.dtype) -> tuple[Tensor, Mixer]:
    """Streams and weights whose normed product is sin(i): streams that are unit vectors, so the norm is known."""
    streams = torch.eye(4, dtype=dtype).unsqueeze(0)  # [1, 4, 4]: stream i is the unit vector i
    norm = (streams.square().sum() / 16 + 1e-6).rsqrt()
    fn = torch.zeros(24, 16, dtype=dtype)
    fn[:, 0] = torch.arange(24, dtype=dtype).sin() / norm
    return streams, Mixer(fn, torch.linspace(-1, 1, 24, dtype=dtype), torch.tensor([.5, 1, 2], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_is_the_published_one(dtype: torch.dtype) -> None:
    x, post, across = mix_streams(*published(dtype), SETTINGS)
    assert x[0].tolist() == pytest.approx(PRE, abs=1e-6)  # unit vectors: the input is the vector of shares
    assert post[0].tolist() == pytest.approx(POST, abs=1e-6)
    for row, expected in zip(across[0].tolist(), ACROSS, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("streams", [2, 4])
def test_across_is_doubly_stochastic(streams: int, random: torch.Generator) -> None:
    mixes = (2 + streams) * streams
    fn, base = torch.randn(mixes, streams * 8, generator=random) * .2, torch.randn(mixes, generator=random)
    mixer = Mixer(fn, base, torch.ones(3))
    _, _, across = mix_streams(torch.randn(7, streams, 8, generator=random), mixer, SETTINGS)
    assert (across > 0).all()
    assert (across.sum(1) - 1).abs().max() < 1e-5  # columns were normalised last
    assert (across.sum(2) - 1).abs().max() < 1e-2


def test_spreading_goes_from_source_to_destination(random: torch.Generator) -> None:
    out, streams = torch.randn(3, 5, generator=random), torch.randn(3, 4, 5, generator=random)
    post, across = torch.randn(3, 4, generator=random), torch.randn(3, 4, 4, generator=random)
    expected = torch.zeros(3, 4, 5, dtype=torch.float64)
    for token in range(3):
        for destination in range(4):
            expected[token, destination] = post[token, destination].double() * out[token]
            for source in range(4):
                expected[token, destination] += across[token, source, destination].double() * streams[token, source]
    assert_close(spread_streams(out, streams, post, across), expected.float())


def test_merging_is_a_weighted_sum(random: torch.Generator) -> None:
    streams = torch.randn(3, 4, 6, generator=random, dtype=torch.float64)
    mixer = Mixer(torch.randn(4, 24, generator=random).double(), torch.randn(4, generator=random).double(),
                  torch.tensor([.7], dtype=torch.float64))
    flat = streams.flatten(1)
    logits = (flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ mixer.fn.T * .7 + mixer.base
    expected = ((1 / (1 + (-logits).exp()) + 1e-6).unsqueeze(-1) * streams).sum(1)
    assert_close(merge_streams(streams, mixer, SETTINGS), expected)


def test_tokens_do_not_see_each_other(random: torch.Generator) -> None:
    mixer = Mixer(torch.randn(24, 32, generator=random), torch.randn(24, generator=random), torch.ones(3))
    streams = torch.randn(9, 4, 8, generator=random)
    together, alone = mix_streams(streams, mixer, SETTINGS), mix_streams(streams[4:5], mixer, SETTINGS)
    for part, single in zip(together, alone, strict=True):
        assert_close(part[4:5], single)


def test_doors_name_the_numbers() -> None:
    streams, mixer = published(torch.float32)
    with pytest.raises(ValueError, match=r"hyper fn has shape \[24, 16\], but \[24, 20\]"):
        mix_streams(torch.zeros(1, 4, 5), mixer, SETTINGS)
    with pytest.raises(ValueError, match=r"post has shape \[1, 3\], but \[1, 4\]"):
        spread_streams(torch.zeros(1, 4), streams, torch.zeros(1, 3), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"hyper fn has shape \[24, 16\], but \[4, 16\]"):
        merge_streams(streams, mixer, SETTINGS)
