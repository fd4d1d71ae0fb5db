from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.hyper import HyperSettings, Mixer, ref
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("hyper")

SETTINGS = HyperSettings(norm_eps=1e-6, eps=1e-6, rounds=20)
TOKENS = [1, 2, 19]
SIZES = [(1, 1), (1, 40), (2, 7), (4, 13), (4, 1031), (5, 9)]  # streams, values


def drawn(random: torch.Generator, *shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=random) * size


def mixer_of(random: torch.Generator, s: int, d: int, *, head: bool = False) -> Mixer:
    """Products with fn are about as large as base, whatever the size of a stream."""
    m = s if head else (2 + s) * s
    return Mixer(drawn(random, m, s * d, size=(s * d) ** -0.5), drawn(random, m), drawn(random, 1 if head else 3) + 1)


def wide(mixer: Mixer) -> Mixer:
    return Mixer(*(part.double() for part in mixer))


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_mixing_equals_the_reference(t: int, s: int, d: int, random: torch.Generator) -> None:
    streams, mixer = drawn(random, t, s, d, size=3), mixer_of(random, s, d)
    found = gpu.mix_streams(streams, mixer, SETTINGS)
    for part, expected in zip(found, ref.mix_streams(streams.double(), wide(mixer), SETTINGS), strict=True):
        assert_close(part, expected)


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_mixing_into_a_normed_input(t: int, s: int, d: int, random: torch.Generator) -> None:
    streams, mixer, norm = drawn(random, t, s, d, size=3), mixer_of(random, s, d), drawn(random, d)
    found = gpu.mix_streams(streams, mixer, SETTINGS, norm)
    for part, expected in zip(found, ref.mix_streams(streams.double(), wide(mixer), SETTINGS, norm.double()), strict=True):
        assert_close(part, expected)


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_spreading_equals_the_reference(t: int, s: int, d: int, random: torch.Generator) -> None:
    given = drawn(random, t, d), drawn(random, t, s, d), drawn(random, t, s), drawn(random, t, s, s)
    assert_close(gpu.spread_streams(*given), ref.spread_streams(*(part.double() for part in given)))


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_merging_equals_the_reference(t: int, s: int, d: int, random: torch.Generator) -> None:
    streams, mixer = drawn(random, t, s, d, size=3), mixer_of(random, s, d, head=True)
    assert_close(gpu.merge_streams(streams, mixer, SETTINGS), ref.merge_streams(streams.double(), wide(mixer), SETTINGS))


@pytest.mark.parametrize("s", [3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_balancing_over_any_logits(s: int, rounds: int, size: float, random: torch.Generator) -> None:
    """Logits far apart leave rows with one great share; streams of zeros leave the logits to the base alone."""
    settings = HyperSettings(1e-6, 1e-6, rounds)
    mixer = Mixer(torch.zeros((2 + s) * s, 8 * s), drawn(random, (2 + s) * s, size=size), torch.ones(3))
    streams = torch.zeros(1, s, 8)
    x, post, across = gpu.mix_streams(streams, mixer, settings)
    _, expected_post, expected = ref.mix_streams(streams.double(), wide(mixer), settings)
    assert torch.equal(x, torch.zeros(1, 8))
    assert_close(post, expected_post)
    assert_close(across, expected)


def test_a_prompt_may_be_cut_anywhere(random: torch.Generator) -> None:
    """Few tokens and many go different ways to the same numbers."""
    streams, mixer = drawn(random, 18, 4, 150), mixer_of(random, 4, 150)
    together = gpu.mix_streams(streams, mixer, SETTINGS)
    pieces = zip(*(gpu.mix_streams(piece, mixer, SETTINGS) for piece in streams.split([1, 3, 13, 1])), strict=True)
    for whole, parts in zip(together, pieces, strict=True):
        assert_close(torch.cat(parts), whole)


def test_sliced_tensors(random: torch.Generator) -> None:
    streams, mixer = drawn(random, 4, 6, 20)[:, ::2, 4:], mixer_of(random, 3, 16)
    norm = drawn(random, 32)[::2]
    pair = (gpu.mix_streams(each, mixer, SETTINGS, weight) for each, weight in ((streams, norm), (streams.clone(), norm.clone())))
    for part, whole in zip(*pair, strict=True):
        assert torch.equal(part, whole)


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    streams, mixer = drawn(random, 3, 4, 16), mixer_of(random, 4, 16)
    streams[1, 2, 5] = float("nan")
    for part in gpu.mix_streams(streams, mixer, SETTINGS):
        assert part[[0, 2]].isfinite().all()
        assert part[1].isnan().all()


def test_no_tokens(random: torch.Generator) -> None:
    mixer = mixer_of(random, 4, 8)
    assert [part.shape for part in gpu.mix_streams(torch.zeros(0, 4, 8), mixer, SETTINGS)] == [(0, 8), (0, 4), (0, 4, 4)]
    empty = torch.zeros(0, 8), torch.zeros(0, 4, 8), torch.zeros(0, 4), torch.zeros(0, 4, 4)
    assert gpu.spread_streams(*empty).shape == (0, 4, 8)


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    streams, mixer, head = drawn(random, 2, 4, 8).double(), wide(mixer_of(random, 4, 8)), wide(mixer_of(random, 4, 8, head=True))
    found, expected = gpu.mix_streams(streams, mixer, SETTINGS), ref.mix_streams(streams, mixer, SETTINGS)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    norm = drawn(random, 8).double()
    assert torch.equal(gpu.mix_streams(streams, mixer, SETTINGS, norm)[0], ref.mix_streams(streams, mixer, SETTINGS, norm)[0])
    assert torch.equal(gpu.merge_streams(streams, head, SETTINGS), ref.merge_streams(streams, head, SETTINGS))
    x, post, across = found
    assert torch.equal(gpu.spread_streams(x, streams, post, across), ref.spread_streams(x, streams, post, across))
