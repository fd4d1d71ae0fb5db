"""How fast kernels are on this machine, measured in the shape of decoding: one token, all threads, random weights.

Every format reads the same random bytes, so that measuring takes no longer than reading them some times. What the bytes mean
does not matter to a kernel's speed as long as they are no denormal numbers; those between FIRST and LAST are none anywhere.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_kernels.attention import Entries, sparse_attention
from dsv4_kernels.indexer import top_indices
from dsv4_kernels.linear import Weight, linear
from dsv4_kernels.moe import Expert, Experts, routed_experts
from dsv4_kernels.native import weights
from dsv4_quant.formats import FORMATS, Packed

MEASURED = weights.FORMATS  # formats with kernels of the CPU's own
FIRST, LAST = 32, 119  # of random bytes
WIDTH, HIDDEN = 1024, 2048  # of an expert: smaller than V4's, so that what a call costs is not underrated
ROWS = 4096  # of a dense matrix, as large as most are
CHOSEN = 6
CACHED = 256  # rows of a matrix that stays in a core's own cache
HEADS, HEAD_DIM, WINDOW, ENTRIES = 32, 512, 128, 512
INDEX_HEADS, INDEX_DIM, INDEX_KEYS = 64, 128, 4096
ROUNDS = 5
SECONDS = 0.02  # of a round
TYPED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
FP4_GROUP = 32  # weights of a row with one scale
ONE = 127  # E8M0 for 1.0


class Speed(NamedTuple):
    """Bytes of one format's weights a second."""

    cached: float  # a matrix that stays in the caches: what the instructions allow
    streamed: float  # matrices from memory, one after the other
    experts: float  # six experts out of many, in no order, as a layer's are


def speed_of(format: str, buffer: Tensor) -> Speed:
    """Measures a format of MEASURED with the bytes of `buffer` (random_bytes), which should be more than the caches hold."""
    x = torch.randn(1, HIDDEN)
    dense = _carved(buffer, format, ROWS, HIDDEN)
    small = _matrix(buffer, format, CACHED, HIDDEN, 0)
    parts = _experts(buffer, format)
    order = random.Random(1).sample(range(len(parts)), len(parts))
    picks = [torch.tensor([[order[(start + place) % len(order)] for place in range(CHOSEN)]])
             for start in range(0, len(order), CHOSEN)]
    shares = torch.full((1, CHOSEN), 1 / CHOSEN)
    with torch.inference_mode():
        return Speed(_nbytes(small) / _seconds([partial(linear, x, small)]),
                     _nbytes(dense[0]) / _seconds([partial(linear, x, matrix) for matrix in dense]),
                     CHOSEN * sum(map(_nbytes, parts[0])) / _seconds(
                         [partial(routed_experts, x, shares, pick, parts, 10.0) for pick in picks]))


def attention_speed() -> float:
    """Multiply-adds a second of a query's attention to a window and chosen entries, keys and values together."""
    q, sink = torch.randn(1, HEADS, HEAD_DIM), torch.zeros(HEADS)
    recent, kv = (torch.randn(rows, HEAD_DIM).bfloat16() for rows in (WINDOW, 4 * ENTRIES))
    entries = Entries(kv, torch.tensor([len(kv)]), torch.randperm(len(kv))[None, :ENTRIES])
    with torch.inference_mode():
        seconds = _seconds([lambda: sparse_attention(q, recent, entries, sink, WINDOW)])
    return 2 * HEADS * HEAD_DIM * (WINDOW + ENTRIES) / seconds


def index_speed() -> float:
    """Multiply-adds a second of an indexer's scores."""
    q, shares = torch.randn(1, INDEX_HEADS, INDEX_DIM), torch.randn(1, INDEX_HEADS)
    keys, visible = torch.randn(INDEX_KEYS, INDEX_DIM).bfloat16(), torch.tensor([INDEX_KEYS])
    with torch.inference_mode():
        seconds = _seconds([lambda: top_indices(q, shares, keys, visible, ENTRIES)])
    return INDEX_HEADS * INDEX_DIM * INDEX_KEYS / seconds


def random_bytes(size: int) -> Tensor:
    """A buffer for `speed_of`, uint8 [size]."""
    return torch.randint(FIRST, LAST + 1, (size,), dtype=torch.uint8)


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call: the median of ROUNDS, each of about SECONDS, behind one that does not count. As in decoding, Python only
    queues what is called."""
    turn = cycle(calls)
    count = max(1, int(SECONDS / min(_round(turn, len(calls)), SECONDS)))
    return statistics.median(_round(turn, count) for _ in range(ROUNDS))


def _round(calls: Iterator[Callable[[], object]], count: int) -> float:
    began = time.perf_counter()
    with backends.queued():
        for call in islice(calls, count):
            call()
    return (time.perf_counter() - began) / count


def _carved(buffer: Tensor, format: str, rows: int, cols: int) -> list[Weight]:
    """As many matrices as the buffer has room for."""
    size = _stored(format, rows, cols)
    return [_matrix(buffer, format, rows, cols, start) for start in range(0, len(buffer) - size + 1, size)]


def _experts(buffer: Tensor, format: str) -> Experts:
    size = _stored(format, WIDTH, HIDDEN)  # each of an expert's three matrices has so many
    return Experts(Expert(_matrix(buffer, format, WIDTH, HIDDEN, start), _matrix(buffer, format, WIDTH, HIDDEN, start + size),
                          _matrix(buffer, format, HIDDEN, WIDTH, start + 2 * size))
                   for start in range(0, len(buffer) - 3 * size + 1, 3 * size))


def _stored(format: str, rows: int, cols: int) -> int:
    kind = FORMATS[format]
    return rows * (cols // kind.block * kind.block_bytes)


def _matrix(buffer: Tensor, format: str, rows: int, cols: int, start: int) -> Weight:
    data = buffer[start:start + _stored(format, rows, cols)].view(rows, -1)
    data = data.view(TYPED[format]) if format in TYPED else data
    if format == "f32":
        return data
    kind = FORMATS[format]
    scale = None
    if kind.scale_rows:
        across = cols // (FP4_GROUP if kind.scale_rows == 1 else kind.scale_rows)
        scale = torch.full((-(-rows // kind.scale_rows), across), ONE, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return Packed(format, (rows, cols), data, scale)


def _nbytes(weight: Weight) -> int:
    return weight.nbytes
