from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4_kernels.norm_rope import frequencies, ref, turns
from tests.kernels.interpreter import QUIET, of
from tests.support.tolerance import assert_close

pytestmark = QUIET

gpu = of("norm_rope")


def table_of(t: int, pairs: int) -> Tensor:
    return turns(torch.arange(7, 7 + t), frequencies(2 * pairs, 10000))


@pytest.mark.parametrize("t", [1, 67])
@pytest.mark.parametrize("pairs", [1, 32])
def test_turns_equal_the_reference(t: int, pairs: int) -> None:
    """Up to a million positions, where angles are as great."""
    positions, freqs = torch.arange(1_000_003 - t, 1_000_003) // 7 * 7, frequencies(2 * pairs, 10000)
    found, angles = gpu.turns(positions, freqs), positions.float().unsqueeze(-1) * freqs
    assert_close(torch.view_as_real(found), torch.stack([angles.double().cos(), angles.double().sin()], -1))
    assert gpu.turns(positions[:0], freqs).shape == (0, pairs)


@pytest.mark.parametrize("position", [0, 127, 1_000_003])
def test_all_that_a_position_decides_is_one_launch(position: int) -> None:
    near, far, ratios = frequencies(14, 10000), frequencies(14, 160000), (4, 128)  # 7 pairs: no tile
    at = torch.tensor([position])
    found, expected = (by.place_token(at, near, far, 131, ratios) for by in (gpu, ref))
    assert torch.equal(found.ring_row, expected.ring_row)
    for one, other in zip(found.entries, expected.entries, strict=True):
        assert torch.equal(one.visible, other.visible)
        assert torch.equal(one.row, other.row)
    angles = [(each.window_turns, each.compress_turns, *(entry.turns for entry in each.entries)) for each in (found, expected)]
    for one, other in zip(*angles, strict=True):
        assert_close(torch.view_as_real(one), torch.view_as_real(other))
    assert torch.equal(found.compress_turns, gpu.turns(at, far))  # bitwise what it is in a step that the host describes


@pytest.mark.parametrize("shape", [(1,), (5,), (127,), (2, 3)])
@pytest.mark.parametrize("d", [1, 2, 7, 64, 515, 4096])
def test_norm_equals_the_reference(shape: tuple[int, ...], d: int, random: torch.Generator) -> None:
    x, weight = torch.randn(*shape, d, generator=random) * 5, torch.randn(d, generator=random)
    assert_close(gpu.rms_norm(x, weight, 1e-6), ref.rms_norm(x.double(), weight.double(), 1e-6))
    assert_close(gpu.rms_norm(x, None, 1e-2), ref.rms_norm(x.double(), None, 1e-2))


@pytest.mark.parametrize("t", [1, 2, 61])
@pytest.mark.parametrize("heads", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("d", "pairs"), [(2, 1), (3, 1), (64, 32), (512, 32), (37, 7)])
def test_rotation_equals_the_reference(t: int, heads: tuple[int, ...], d: int, pairs: int, random: torch.Generator) -> None:
    x, table = torch.randn(t, *heads, d, generator=random), table_of(t, pairs)
    for inverse in (False, True):
        turned = gpu.rotate(x, table, inverse)
        assert torch.equal(turned[..., :d - 2 * pairs], x[..., :d - 2 * pairs])
        assert_close(turned, ref.rotate(x.double(), table.to(torch.complex128), inverse))


def test_tensors_in_any_memory_order(random: torch.Generator) -> None:
    x, weight, table = torch.randn(6, 5, 40, generator=random), torch.randn(80, generator=random), table_of(10, 8)
    for view in (x[::2], x.transpose(0, 1), x[:, :, 3:20].transpose(0, 1)):
        same = view.contiguous()
        part = weight[::2][:view.shape[-1]]
        turn = table[::2][:len(view)] if len(view) < 5 else table.T.contiguous().T[:len(view)]
        assert torch.equal(gpu.rms_norm(view, part, 1e-6), gpu.rms_norm(same, part.contiguous(), 1e-6))
        assert torch.equal(gpu.rotate(view, turn, False), gpu.rotate(same, turn.contiguous(), False))


def test_what_is_given_stays_as_it_is(random: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=random)
    before = x.clone()
    gpu.rms_norm(x, None, 1e-6)
    gpu.rotate(x, table_of(3, 16), False)
    assert torch.equal(x, before)


def test_no_number_stays_no_number(random: torch.Generator) -> None:
    x = torch.randn(3, 40, generator=random)
    x[1, 37] = float("nan")
    normed = gpu.rms_norm(x, None, 1e-6)
    assert normed[1].isnan().all()
    assert normed[[0, 2]].isfinite().all()


def test_no_rows() -> None:
    assert gpu.rms_norm(torch.zeros(0, 3, 8), torch.ones(8), 1e-6).shape == (0, 3, 8)
    assert gpu.rotate(torch.zeros(0, 3, 8), table_of(0, 4), False).shape == (0, 3, 8)


def test_other_types_are_computed_by_the_reference(random: torch.Generator) -> None:
    x, weight, table = torch.randn(3, 64, generator=random), torch.randn(64, generator=random), table_of(3, 16)
    assert torch.equal(gpu.rms_norm(x.double(), weight.double(), 1e-6), ref.rms_norm(x.double(), weight.double(), 1e-6))
    wide = table.to(torch.complex128)
    assert torch.equal(gpu.rotate(x.double(), wide, False), ref.rotate(x.double(), wide, False))
    assert_close(gpu.rotate(x, table.conj(), False), gpu.rotate(x, table, True))
