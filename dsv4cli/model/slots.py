"""Slots of a card: room for packed experts of any of its layers, and how they are copied there from the mapped file.

Bytes go through pinned memory, in two halves: while one half is on its way, on a stream of its own, the host fills the other. A
card with a slot for each of its experts has none of that: they come once, straight from the file. `Desk` is where card and host
meet in a decoded token.
The same code runs with the CPU as the card; then nothing is asynchronous, and streams and events are None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.held import Told
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.native.queue import settle
from dsv4_quant.formats import Packed

ALIGNED = 16  # bytes; what kernels read at once
PIECES = 8  # of a card's slots; so many bytes are given back at a time when others need the memory


class Room(NamedTuple):
    """A device that computes layers first .. last - 1, with slots for so many of their routed experts."""

    device: str
    first: int
    last: int
    slots: int


class Card:
    """Slots for the experts of one card's layers, and buffers for `staged` at a time that only pass through."""

    def __init__(self, device: torch.device | str, slots: int, nbytes: int, staged: int, passing: bool = True) -> None:
        """nbytes: of a slot, for the largest expert. passing: whether experts will pass through, having no slot; otherwise
        buffers are made when there is need all the same. Has fewer slots where the card has less memory than was asked for."""
        self.device = torch.device(device)
        self.nbytes = nbytes
        self.staged = staged  # how many experts pass through at once
        self.lacking = 0  # slots that there was no memory for, or that were given back
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._halves: list[_Half] = []
        if passing:
            self._make_buffers()
        self._turn = 0
        self._pieces: dict[int, Tensor] = {}  # by number of the piece; slots of one that is gone are no more
        self._per_piece = max(1, -(-slots // PIECES))
        for first in range(0, slots, self._per_piece):
            count = min(self._per_piece, slots - first)
            try:
                self._pieces[first // self._per_piece] = self._buffer(count)
            except torch.OutOfMemoryError:
                self.lacking = slots - first
                break

    @property
    def slots(self) -> list[int]:
        """The numbers of the slots that there are."""
        return [number * self._per_piece + place for number, piece in self._pieces.items() for place in range(len(piece))]

    def views(self, like: Expert) -> Expert | None:
        """The first slot as an expert like that, whatever lies there; None where there are no slots. It goes last."""
        return _view(like, next(iter(self._pieces.values()))[0]) if self._pieces else None

    def put(self, experts: Sequence[Expert], slots: Sequence[int]) -> list[Expert]:
        """Copies experts into slots; what lay there must not be needed any more. Returns the copies."""
        made = []
        for start in range(0, len(experts), self.staged):
            these = experts[start:start + self.staged]
            targets = [self._at(slot) for slot in slots[start:start + self.staged]]
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
            if self._halves:
                self._sent(these, targets).landed(self._stream)
            else:
                _copy_parts(these, targets)
            made += [_view(expert, target) for expert, target in zip(these, targets, strict=True)]
        return made

    def bring(self, experts: Sequence[Expert]) -> Experts:
        """Copies at most `staged` experts, alike, into buffers; they lie there until the second call from now. The list may be
        longer: behind them is what lay there before."""
        if not self._halves:
            self._make_buffers()
        half = self._halves[self._turn]
        half.demand_read(self._stream)
        self._sent(experts, half.there[:len(experts)].unbind()).landed(self._stream)
        return half.views(experts[0])

    def read(self) -> None:
        """To be called when all products with what `bring` brought have been launched."""
        self._halves[1 - self._turn].was_read()

    def to_host(self, *tensors: Tensor) -> _Fetched:
        """Starts copies to the host, behind what has been launched so far."""
        settle()
        pinned = self._stream is not None
        copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x, non_blocking=pinned) for x in tensors]
        for copy in copies:
            alloc.held(copy)
        return _Fetched(copies, _recorded(self.device))

    def to_card(self, x: Tensor) -> Tensor:
        """A copy of what the host has computed; the host goes on."""
        return alloc.held(x.pin_memory().to(self.device, non_blocking=True) if self._stream is not None else x)

    def give_back(self) -> list[int]:
        """Frees a piece of the slots and returns their numbers; [] where there is none left."""
        if not self._pieces:
            return []
        number, piece = self._pieces.popitem()
        self.lacking += len(piece)
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
        return [number * self._per_piece + place for place in range(len(piece))]

    def _make_buffers(self) -> None:
        self._halves = [_Half(self.device, self.staged, self.nbytes) for _ in range(2)]

    def _buffer(self, count: int) -> Tensor:
        return alloc.empty((count, self.nbytes), torch.uint8, self.device)

    def _at(self, slot: int) -> Tensor:
        return self._pieces[slot // self._per_piece][slot % self._per_piece]

    def _sent(self, experts: Sequence[Expert], targets: Sequence[Tensor]) -> _Half:
        """Starts the copies, through the half whose turn it is."""
        half = self._halves[self._turn]
        self._turn = 1 - self._turn
        half.demand_sent()
        with _on(self._stream):
            for bytes_here, expert, target in zip(half.host, experts, targets, strict=False):
                _copy_parts([expert], [bytes_here])
                target.copy_(bytes_here, non_blocking=True)
        return half


class Desk:
    """Where a card tells the host what it chose for one token, and gets back what the host computed. Memory of the host that
    the card's kernels read and write themselves; always the same, so that recorded launches find it."""

    def __init__(self, device: torch.device | str, width: int, chosen: int) -> None:
        """width: of a token's vector; chosen: experts that it visits in a layer."""
        self.device = torch.device(device)
        pinned = self.device.type == "cuda"
        self.part = torch.zeros(1, width, pin_memory=pinned)
        self.told = Told(torch.zeros(1, width, pin_memory=pinned), torch.zeros(1, chosen, pin_memory=pinned),
                         torch.zeros(1, chosen, dtype=torch.int64, pin_memory=pinned))
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What the card was given to do so far ends with the choice."""
        self._event = _recorded(self.device)

    def wait(self) -> Told:
        """Returns when the card came to the mark."""
        settle()
        if self._event is not None:
            self._event.synchronize()
        return self.told


class _Half:
    """Pinned memory for some experts, as much on the card, and what has to be waited for before either is written again."""

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        card = device.type == "cuda"
        self.host = torch.empty(count, nbytes, dtype=torch.uint8, pin_memory=card)
        self.there = alloc.empty((count, nbytes), torch.uint8, device)
        self._device = device
        self._sent: torch.cuda.Event | None = None
        self._read: torch.cuda.Event | None = None
        self._views: dict[tuple[object, ...], Experts] = {}  # experts alike lie alike, so that kernels know them already

    def demand_sent(self) -> None:
        """Returns when the host may write into the pinned memory."""
        if self._sent is not None:
            self._sent.synchronize()

    def landed(self, stream: torch.cuda.Stream | None) -> None:
        """What the card is told from now on waits for the copies on `stream`."""
        if stream is not None:
            self._sent = stream.record_event()
            torch.cuda.current_stream(self._device).wait_event(self._sent)

    def was_read(self) -> None:
        self._read = _recorded(self._device)

    def demand_read(self, stream: torch.cuda.Stream | None) -> None:
        """What `stream` is told from now on waits for the products that read the buffers."""
        if stream is not None and self._read is not None:
            stream.wait_event(self._read)

    def views(self, like: Expert) -> Experts:
        kind = tuple((weight.format, weight.shape, weight.exact, weight.scale is not None and weight.scale.dtype)
                     for weight in like if isinstance(weight, Packed))
        if kind not in self._views:
            self._views[kind] = Experts(_view(like, target) for target in self.there)
        return self._views[kind]


class _Fetched(NamedTuple):
    copies: list[Tensor]
    event: torch.cuda.Event | None

    def wait(self) -> list[Tensor]:
        """The copies, as soon as they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.copies


def slot_bytes(expert: Expert) -> int:
    """Bytes of a slot that an expert fits into."""
    return sum(_aligned(part.nbytes) for part, _ in _placed(expert))


def _placed(expert: Expert) -> Iterator[tuple[Tensor, int]]:
    """What a packed expert consists of, with the place in a slot where each part begins."""
    place = 0
    for weight in expert:
        assert isinstance(weight, Packed), "only packed experts have slots"
        for part in (weight.data, weight.scale):
            if part is not None:
                yield part, place
                place += _aligned(part.nbytes)


def _copy_parts(experts: Sequence[Expert], targets: Sequence[Tensor]) -> None:
    """Copies the bytes of experts to where they are to lie; targets uint8 [slot]."""
    for expert, target in zip(experts, targets, strict=True):
        for part, place in _placed(expert):
            target[place:place + part.nbytes].copy_(part.reshape(-1).view(torch.uint8))


def _view(expert: Expert, slot: Tensor) -> Expert:
    """The copy of an expert that lies in a slot."""
    parts = iter([slot[place:place + part.nbytes].view(part.dtype).view(part.shape) for part, place in _placed(expert)])
    return Expert(*(replace(weight, data=next(parts), scale=None if weight.scale is None else next(parts))
                    for weight in expert if isinstance(weight, Packed)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _recorded(device: torch.device) -> torch.cuda.Event | None:
    """An event behind what the device was told so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
