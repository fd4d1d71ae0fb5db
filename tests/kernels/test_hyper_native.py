from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.hyper import HyperSettings, Mixer, merge_streams, mix_streams, ref, spread_streams
from dsv4_kernels.norm_rope import rms_norm
from tests.kernels.native import kernels  # noqa: F401
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")

SETTINGS = HyperSettings(norm_eps=1e-6, eps=1e-6, rounds=20)
TOKENS = [1, 2, 5, 127, 128]
SIZES = [(1, 1), (1, 40), (2, 7), (4, 1), (4, 13), (4, 64), (4, 2048), (5, 9), (5, 96)]  # streams, values


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
    found = mix_streams(streams, mixer, SETTINGS)
    for part, expected in zip(found, ref.mix_streams(streams.double(), wide(mixer), SETTINGS), strict=True):
        assert_close(part, expected)


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_spreading_equals_the_reference(t: int, s: int, d: int, random: torch.Generator) -> None:
    given = drawn(random, t, d), drawn(random, t, s, d), drawn(random, t, s), drawn(random, t, s, s)
    assert_close(spread_streams(*given), ref.spread_streams(*(part.double() for part in given)))


@pytest.mark.parametrize("t", TOKENS)
@pytest.mark.parametrize(("s", "d"), SIZES)
def test_merging_equals_the_reference(t: int, s: int, d: int, random: torch.Generator) -> None:
    streams, mixer = drawn(random, t, s, d, size=3), mixer_of(random, s, d, head=True)
    assert_close(merge_streams(streams, mixer, SETTINGS), ref.merge_streams(streams.double(), wide(mixer), SETTINGS))


@pytest.mark.parametrize("s", [3, 4])
@pytest.mark.parametrize("rounds", [1, 2, 20])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_balancing_over_any_logits(s: int, rounds: int, size: float, random: torch.Generator) -> None:
    """Logits far apart leave rows with one great share; streams of zeros leave the logits to the base alone."""
    settings = HyperSettings(1e-6, 1e-6, rounds)
    mixer = Mixer(torch.zeros((2 + s) * s, 8 * s), drawn(random, (2 + s) * s, size=size), torch.ones(3))
    streams = torch.zeros(1, s, 8)
    x, post, across = mix_streams(streams, mixer, settings)
    _, expected_post, expected = ref.mix_streams(streams.double(), wide(mixer), settings)
    assert torch.equal(x, torch.zeros(1, 8))
    assert_close(post, expected_post)
    assert_close(across, expected)


@pytest.mark.parametrize("s", [2, 4])
def test_a_token_does_not_notice_its_company(s: int, random: torch.Generator) -> None:
    """Bitwise: a prompt may be cut anywhere."""
    streams, mixer = drawn(random, 37, s, 300), mixer_of(random, s, 300)
    together = mix_streams(streams, mixer, SETTINGS)
    for cut in (1, 16):
        pieces = zip(*(mix_streams(piece, mixer, SETTINGS) for piece in streams.split(cut)), strict=True)
        for whole, parts in zip(together, pieces, strict=True):
            assert torch.equal(whole, torch.cat(parts))


def test_sliced_tensors(random: torch.Generator) -> None:
    streams, mixer = drawn(random, 4, 6, 20)[:, ::2, 4:], mixer_of(random, 3, 16)
    for part, whole in zip(mix_streams(streams, mixer, SETTINGS), mix_streams(streams.clone(), mixer, SETTINGS), strict=True):
        assert torch.equal(part, whole)


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    streams, mixer = drawn(random, 3, 4, 16), mixer_of(random, 4, 16)
    streams[1, 2, 5] = float("nan")
    for part in mix_streams(streams, mixer, SETTINGS):
        assert part[[0, 2]].isfinite().all()
        assert part[1].isnan().all()


def test_no_tokens(random: torch.Generator) -> None:
    mixer = mixer_of(random, 4, 8)
    assert [part.shape for part in mix_streams(torch.zeros(0, 4, 8), mixer, SETTINGS)] == [(0, 8), (0, 4), (0, 4, 4)]
    empty = torch.zeros(0, 8), torch.zeros(0, 4, 8), torch.zeros(0, 4), torch.zeros(0, 4, 4)
    assert spread_streams(*empty).shape == (0, 4, 8)


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    assert backends.pick("hyper", "cpu").name == "cpu"
    streams, mixer, head = drawn(random, 2, 4, 8).double(), wide(mixer_of(random, 4, 8)), wide(mixer_of(random, 4, 8, head=True))
    found, expected = mix_streams(streams, mixer, SETTINGS), ref.mix_streams(streams, mixer, SETTINGS)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(merge_streams(streams, head, SETTINGS), ref.merge_streams(streams, head, SETTINGS))
    x, post, across = found
    assert torch.equal(spread_streams(x, streams, post, across), ref.spread_streams(x, streams, post, across))


@pytest.mark.parametrize(("t", "s", "d"), [(1, 4, 64), (5, 4, 515), (127, 3, 31)])
def test_the_mixture_is_normed_on_the_way(t: int, s: int, d: int, random: torch.Generator) -> None:
    streams, mixer, norm = torch.randn(t, s, d, generator=random), mixer_of(random, s, d), torch.randn(d, generator=random)
    found, plain = mix_streams(streams, mixer, SETTINGS, norm), mix_streams(streams, mixer, SETTINGS)
    assert torch.equal(found[0], rms_norm(plain[0], norm, SETTINGS.norm_eps))
    assert all(torch.equal(*both) for both in zip(found[1:], plain[1:], strict=True))
    assert_close(found[0], ref.mix_streams(streams.double(), wide(mixer), SETTINGS, norm.double())[0])
    with pytest.raises(ValueError, match="norm weight"):
        mix_streams(streams, mixer, SETTINGS, norm[1:])
