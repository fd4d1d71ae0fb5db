"""Kernels that are queued compute what they would have computed at once."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from dsv4_kernels import alloc, backends
from dsv4_kernels.cache import keep
from dsv4_kernels.linear import linear
from dsv4_kernels.native import library, queue
from dsv4_kernels.norm_rope import rms_norm
from dsv4_kernels.router import route_by_hash
from tests.kernels.native import kernels  # noqa: F401

pytestmark = pytest.mark.usefixtures("kernels", "two_threads")


@pytest.fixture
def two_threads() -> None:
    backends.use_threads(2)


def chain(x: Tensor, weight: Tensor, times: int) -> Tensor:
    """Products and norms that each need the one before."""
    for _ in range(times):
        x = rms_norm(linear(x, weight), None, 1e-6)
    return x


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("times", [1, 40, 1200])  # the last are more calls than the queue is long
def test_the_result_is_that_of_calls_at_once(times: int, lazily: bool, random: torch.Generator) -> None:
    x, weight = torch.randn(1, 67, generator=random), torch.randn(67, 67, generator=random)
    expected = chain(x, weight, times)
    with backends.queued(lazily=lazily):
        found = chain(x, weight, times)
    assert torch.equal(found, expected)


def test_nothing_is_computed_before_somebody_waits(random: torch.Generator) -> None:
    x, to = torch.randn(1, 8, generator=random), torch.zeros(1, 8)
    with backends.queued(lazily=True):
        keep(x, to)
        assert not to.any()
        with backends.queued():  # within another it is no queue of its own
            keep(x, to)
        assert not to.any()
    assert torch.equal(to, x)


def test_torch_waits_for_kernels_whose_results_it_takes(random: torch.Generator) -> None:
    x, weight = torch.randn(6, 64, generator=random), torch.randn(64, 64, generator=random)
    y = linear(x, weight)
    with backends.queued(lazily=True):
        copied = rms_norm(linear(x, weight).T, None, 0.0)  # not contiguous
        fallen_back = linear(linear(x, weight), weight.T)  # a weight that lies as no kernel expects
    assert torch.equal(copied, rms_norm(y.T.contiguous(), None, 0.0))
    assert torch.equal(fallen_back, linear(y, weight.T))


def test_memory_that_nobody_else_holds_is_kept_until_it_was_used(random: torch.Generator) -> None:
    weight = torch.randn(257, 257, generator=random)
    x = torch.randn(1, 257, generator=random)
    expected = chain(x, weight, 30)
    with backends.queued(lazily=True):
        found = chain(x, weight, 30)
        scribbled = [torch.full((1, 257), 7.0) for _ in range(64)]  # where freed memory would be handed out again
    assert torch.equal(found, expected)
    assert len(scribbled) == 64


def test_complaints_come_when_the_queue_ends_and_what_follows_is_harmless(random: torch.Generator) -> None:
    x, gate = torch.randn(1, 32, generator=random), torch.randn(4, 32, generator=random)
    table, ids = torch.tensor([[0, 1], [2, 9]]), torch.tensor([1])
    with pytest.raises(IndexError, match="outside the 4"), backends.queued():
        weights, experts = route_by_hash(x, gate, table, ids, 1.0)
    assert experts.tolist() == [[0, 0]]
    assert weights.isnan().all()


def test_an_error_leaves_no_kernel_behind(random: torch.Generator) -> None:
    x, to = torch.randn(1, 8, generator=random), torch.zeros(1, 8)

    def interrupted() -> None:
        with backends.queued(lazily=True):
            keep(x, to)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(to, x)


def test_another_thread_computes_at_once(random: torch.Generator) -> None:
    x, weight = torch.randn(1, 67, generator=random), torch.randn(67, 67, generator=random)
    expected, found = chain(x, weight, 5), []
    with backends.queued(lazily=True):
        mine = chain(x, weight, 5)
        other = threading.Thread(target=lambda: found.append(chain(x, weight, 5)))
        other.start()
        other.join()
        assert torch.equal(found[0], expected)
    assert torch.equal(mine, expected)


def test_a_single_thread_has_no_queue(random: torch.Generator) -> None:
    backends.use_threads(1)
    x, to = torch.randn(1, 8, generator=random), torch.zeros(1, 8)
    with backends.queued(lazily=True):
        keep(x, to)
        assert torch.equal(to, x)
    assert library.threads() == 1
    backends.use_threads(2)


def test_a_tape_computes_on_what_its_memory_then_holds(random: torch.Generator) -> None:
    weight, drawn = torch.randn(67, 67, generator=random), torch.randn(4, 1, 67, generator=random)
    x, record = torch.empty(1, 67), backends.tapes()
    tape = record()
    tape.begin()
    with backends.queued(), backends.queued():  # which a tape knows nothing of
        y = chain(x, weight, 40)
    tape.end()
    for threads in (1, 2):
        backends.use_threads(threads)
        for given in drawn:
            x.copy_(given)
            tape.replay()
            assert torch.equal(y, chain(given, weight, 40))


def test_tapes_share_memory_that_nobody_can_reach(random: torch.Generator) -> None:
    """Results are good until another tape of the same arena is computed."""
    weight, x = torch.randn(67, 67, generator=random), torch.randn(1, 67, generator=random)
    arena, results = alloc.Arena(), []
    tapes = [queue.Tape(arena) for _ in range(3)]
    for times, tape in enumerate(tapes, 20):
        tape.begin()
        results.append(chain(x, weight, times))
        tape.end()
    assert arena.nbytes < 4 * 67 * 8  # of what 126 calls hand to each other
    for times in (22, 20, 21, 22):
        tapes[times - 20].replay()
        assert torch.equal(results[times - 20], chain(x, weight, times))
    views = results.pop().view(-1)[60:]
    free = arena.nbytes
    assert arena.nbytes == free, "a view is a way to reach it"
    del views
    assert arena.nbytes > free


def test_what_torch_would_compute_is_on_no_tape(random: torch.Generator) -> None:
    x, weight, record = torch.randn(1, 67, generator=random), torch.randn(67, 67, generator=random), backends.tapes()
    tape = record()
    tape.begin()
    with pytest.raises(RuntimeError, match="by torch"):
        linear(linear(x, weight), weight.T)
    with pytest.raises(RuntimeError, match="already"):
        record().begin()
    linear(x, weight)
    tape.abandon()
    tape.abandon()
    assert torch.equal(linear(x, weight), linear(x, weight.clone())), "what was begun has ended"


def test_another_thread_knows_nothing_of_a_tape(random: torch.Generator) -> None:
    x, weight = torch.randn(1, 67, generator=random), torch.randn(67, 67, generator=random)
    expected, found, arena = chain(x, weight, 5), [], alloc.Arena()
    tape = queue.Tape(arena)
    tape.begin()
    other = threading.Thread(target=lambda: found.append(chain(x, weight, 5)))
    other.start()
    other.join()
    tape.end()
    tape.replay()
    assert torch.equal(found[0], expected)
    assert arena.nbytes == 0


def test_a_tape_complains_each_time_it_has_a_reason(random: torch.Generator) -> None:
    x, gate = torch.randn(1, 32, generator=random), torch.randn(4, 32, generator=random)
    table, ids, tape = torch.tensor([[0, 1], [2, 9]]), torch.tensor([1]), backends.tapes()()
    tape.begin()
    _, experts = route_by_hash(x, gate, table, ids, 1.0)
    tape.end()
    for right in (False, True, False):
        ids.fill_(1 - right)
        if right:
            tape.replay()
            assert experts.tolist() == [[0, 1]]
        else:
            with pytest.raises(IndexError, match="outside the 4"):
                tape.replay()
