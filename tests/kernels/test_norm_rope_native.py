from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.norm_rope import frequencies, place_token, ref, rms_norm, rotate, turns
from dsv4_kernels.norm_rope.cpu import norm_rotate
from tests.kernels.native import kernels  # noqa: F401
from tests.support.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("kernels")

WIDTHS = [1, 2, 7, 8, 31, 64, 515, 4096]


def table_of(t: int, pairs: int) -> Tensor:
    return turns(torch.arange(7, 7 + t), frequencies(2 * pairs, 10000))


@pytest.mark.parametrize("t", [1, 2, 61])
@pytest.mark.parametrize("pairs", [1, 32])
def test_turns_equal_the_reference(t: int, pairs: int) -> None:
    """Up to a million positions, where angles are as great."""
    positions, freqs = torch.arange(1_000_003 - t, 1_000_003) // 7 * 7, frequencies(2 * pairs, 10000)
    found, angles = turns(positions, freqs), positions.float().unsqueeze(-1) * freqs
    assert_close(torch.view_as_real(found), torch.stack([angles.double().cos(), angles.double().sin()], -1))
    assert turns(positions[:0], freqs).shape == (0, pairs)


@pytest.mark.parametrize("ratios", [(), (4,), (4, 128), (2, 3, 5, 7)])
@pytest.mark.parametrize("position", [0, 127, 1_000_003])
def test_what_a_position_decides(position: int, ratios: tuple[int, ...]) -> None:
    near, far = frequencies(14, 10000), frequencies(14, 160000)
    found, expected = (by(torch.tensor([position]), near, far, 131, ratios) for by in (place_token, ref.place_token))
    assert torch.equal(found.ring_row, expected.ring_row)
    assert torch.equal(found.window_turns, turns(torch.tensor([position]), near))  # bitwise what prompts turn by
    assert torch.equal(found.compress_turns, turns(torch.tensor([position]), far))
    for one, other, ratio in zip(found.entries, expected.entries, ratios, strict=True):
        assert torch.equal(one.visible, other.visible)
        assert torch.equal(one.row, other.row)
        assert torch.equal(one.turns, turns(torch.tensor([position // ratio * ratio]), far))


def test_more_kinds_of_groups_than_there_is_a_kernel_for() -> None:
    near, far, at, ratios = frequencies(14, 10000), frequencies(14, 160000), torch.tensor([127]), (2, 3, 5, 7, 11)
    found, expected = (by(at, near, far, 131, ratios) for by in (place_token, ref.place_token))
    assert torch.equal(found.compress_turns, expected.compress_turns)
    assert [entry.row for entry in found.entries] == [entry.row for entry in expected.entries]


@pytest.mark.parametrize("shape", [(1,), (5,), (127,), (2, 3), (128, 2)])
@pytest.mark.parametrize("d", WIDTHS)
def test_norm_equals_the_reference(shape: tuple[int, ...], d: int, random: torch.Generator) -> None:
    x, weight = torch.randn(*shape, d, generator=random) * 5, torch.randn(d, generator=random)
    assert_close(rms_norm(x, weight, 1e-6), ref.rms_norm(x.double(), weight.double(), 1e-6))
    assert_close(rms_norm(x, None, 1e-2), ref.rms_norm(x.double(), None, 1e-2))


@pytest.mark.parametrize("t", [1, 2, 5, 127])
@pytest.mark.parametrize("heads", [(), (1,), (3,), (2, 5)])
@pytest.mark.parametrize(("d", "pairs"), [(2, 1), (3, 1), (64, 32), (65, 32), (512, 32), (37, 7), (31, 15)])
def test_rotation_equals_the_reference(t: int, heads: tuple[int, ...], d: int, pairs: int, random: torch.Generator) -> None:
    x, table = torch.randn(t, *heads, d, generator=random), table_of(t, pairs)
    for inverse in (False, True):
        turned = rotate(x, table, inverse=inverse)
        assert torch.equal(turned[..., :d - 2 * pairs], x[..., :d - 2 * pairs])
        assert_close(turned, ref.rotate(x.double(), table.to(torch.complex128), inverse))


@pytest.mark.parametrize("heads", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("d", "pairs"), [(2, 1), (65, 32), (512, 32), (31, 15)])
def test_both_at_once_are_one_after_the_other(heads: tuple[int, ...], d: int, pairs: int, random: torch.Generator) -> None:
    for t in (1, 5, 127):
        x, table, weight = torch.randn(t, *heads, d, generator=random), table_of(t, pairs), torch.randn(d, generator=random)
        for norm in (weight, None):
            assert torch.equal(norm_rotate(x, norm, 1e-6, table), rotate(rms_norm(x, norm, 1e-6), table))


def test_large_prompts_are_shared_out(random: torch.Generator) -> None:
    """More rows than a piece of work, and a count that pieces do not divide."""
    x, table = torch.randn(131, 3, 515, generator=random), table_of(131, 32)
    assert torch.equal(rms_norm(x, None, 1e-6), torch.cat([rms_norm(row[None], None, 1e-6) for row in x]))
    assert torch.equal(rotate(x, table), torch.cat([rotate(row[None], turn[None]) for row, turn in zip(x, table, strict=True)]))


def test_tensors_in_any_memory_order(random: torch.Generator) -> None:
    x, weight, table = torch.randn(6, 5, 40, generator=random), torch.randn(80, generator=random), table_of(10, 8)
    for view in (x[::2], x.transpose(0, 1), x[:, :, 3:20].transpose(0, 1)):
        same = view.contiguous()
        part = weight[::2][:view.shape[-1]]
        turn = table[::2][:len(view)] if len(view) < 5 else table.T.contiguous().T[:len(view)]
        assert torch.equal(rms_norm(view, part, 1e-6), rms_norm(same, part.contiguous(), 1e-6))
        assert torch.equal(rotate(view, turn), rotate(same, turn.contiguous()))


def test_what_is_given_stays_as_it_is(random: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=random)
    before = x.clone()
    rms_norm(x, None, 1e-6)
    rotate(x, table_of(3, 16))
    assert torch.equal(x, before)


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    x = torch.randn(3, 40, generator=random)
    x[1, 37] = float("nan")
    normed = rms_norm(x, None, 1e-6)
    assert normed[1].isnan().all()
    assert normed[[0, 2]].isfinite().all()


def test_no_rows() -> None:
    assert rms_norm(torch.zeros(0, 3, 8), torch.ones(8), 1e-6).shape == (0, 3, 8)
    assert rotate(torch.zeros(0, 3, 8), table_of(0, 4)).shape == (0, 3, 8)


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    assert backends.pick("norm_rope", "cpu").name == "cpu"
    x, weight, table = torch.randn(3, 64, generator=random), torch.randn(64, generator=random), table_of(3, 16)
    assert torch.equal(rms_norm(x.double(), weight.double(), 1e-6), ref.rms_norm(x.double(), weight.double(), 1e-6))
    assert torch.equal(rms_norm(x, weight.double(), 1e-6), ref.rms_norm(x, weight.double(), 1e-6))
    wide = table.to(torch.complex128)
    assert torch.equal(rotate(x.double(), wide), ref.rotate(x.double(), wide, False))
    assert_close(rotate(x, table.conj()), rotate(x, table, inverse=True))
