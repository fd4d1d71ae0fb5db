"""Routed experts of which a card holds some, and the mapped file all: `Tiers` is the one door to those of a layer.

A token's router decides on the card; the host reads its choice, unless all experts of the layer lie in slots. What lies in slots
is computed on the card. The rest is computed by the CPU where it lies, from a copy of the tokens, while the card computes its
own part; or, for more than BESIDE tokens, copied to the card in groups, one on its way while the other is computed. Sums have
one order for a given placement: card's experts and the shared one, the others.

What a card launches for a single token is the same whatever was chosen, so a recorded run serves them all: kernels find out
themselves what lies in slots, and the host acts between two pieces (model/recording.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor

from dsv4_kernels import alloc
from dsv4_kernels.held import Held, held_experts, join_part, other_experts, route_and_tell
from dsv4_kernels.hyper import spread_streams
from dsv4_kernels.moe import Expert, Experts, routed_experts, shared_expert
from dsv4_kernels.native.queue import by_torch, settle
from dsv4_kernels.residual import Joined, Residual, experts_into_streams
from dsv4_kernels.router import Router, route
from dsv4cli.model.slots import Card, Desk, Room, slot_bytes
from dsv4cli.model.step import Step

BESIDE = 16  # tokens up to which the CPU computes what is missing: more of them share the time of a copy
Place = tuple[int, int]  # layer, number


class Tiers:
    """The routed experts of one layer."""

    def __init__(self, experts: Experts, card: Card, desk: Desk) -> None:
        """experts: where they lie in the mapped file. desk: where card and host meet, one for all layers of a card."""
        self.experts = experts
        self.card = card
        self.desk = desk
        self.seen: list[Tensor] = []  # experts chosen, int64 [t, k], on the host or the card, since a pass began
        self.slots: dict[int, int] = {}  # by expert
        self.told = torch.zeros(desk.told.experts.shape, dtype=torch.int64, device=card.device)  # a whole layer's last choice
        self.stays = True  # recorded runs know where everything is
        self._copies: dict[int, Expert] = {}
        self.anew()

    @property
    def whole(self) -> bool:
        """Whether all experts lie in slots; then the host has no part in this layer."""
        return len(self.slots) == len(self.experts)

    def __call__(self, x: Tensor, step: Step, router: Router, shared: Expert, limit: float, residual: Residual) -> Joined:
        """Shared expert and chosen ones. x [t, hidden], on the card; what comes out joins the streams."""
        if self.whole and step.live is not None:
            return experts_into_streams(x, step.ids, router, shared, self._held.there, limit, residual, self.told)
        if len(x) == 1 and not self.whole:
            shares, chosen = route_and_tell(x, router, step.ids, self.desk.told)
            step.by_host(self.desk.mark)
            out = held_experts(x, shares, chosen, shared, self._held, limit)  # while the host does its part
            step.by_host(lambda: self.answer(limit))
            return join_part(out, self.desk.part, residual)
        out = self._of_several(x, *route(x, router, step.ids), shared, limit)
        return Joined(spread_streams(out, residual.streams, residual.post, residual.across))

    def answer(self, limit: float) -> None:
        """The host's part of a single token: computes what is chosen and lies in no slot."""
        told = self.desk.wait()
        self.seen.append(told.experts.clone())
        other_experts(told, self.experts, self._held, limit, self.desk.part)

    def _of_several(self, x: Tensor, shares: Tensor, chosen: Tensor, shared: Expert, limit: float) -> Tensor:
        """Shared expert and chosen ones of any number of tokens. shares [t, k], chosen int64 [t, k], all on the card ->
        [t, hidden]."""
        if self.whole:
            self.seen.append(chosen)
            return routed_experts(x, shares, chosen, self._held.there, limit, onto=shared_expert(x, shared, limit))
        few = len(x) <= BESIDE
        fetched = self.card.to_host(shares, chosen, *([x] if few else []))
        out = shared_expert(x, shared, limit)  # while the host waits for the choice
        shares, chosen, *copied = fetched.wait()
        self.seen.append(chosen)
        places = self._held.places[chosen]
        hits = places >= 0
        if hits.any():
            held = [self.card.to_card(each) for each in picked(shares, places, hits)]
            out = routed_experts(x, held[0], held[1], self._held.there, limit, onto=out)
        if hits.all():
            return out
        if few:
            return self._beside(copied[0], *picked(shares, chosen, ~hits), limit, out)
        return self._staged(x, shares, chosen, chosen[~hits].unique(), limit, out)

    def hold(self, numbers: Sequence[int], slots: Sequence[int]) -> None:
        """Copies experts into slots, where nothing else may lie, and computes with the copies from now on."""
        copies = self.card.put([self.experts[number] for number in numbers], slots)
        self.slots.update(zip(numbers, slots, strict=True))
        self._copies.update(zip(numbers, copies, strict=True))
        self.stays &= self._held.hold(self._copies)

    def release(self, numbers: Iterable[int]) -> None:
        """Computes with these copies no more."""
        for number in numbers:
            self._copies.pop(number, None)
        self.stays &= self._held.hold(self._copies)
        self.slots = {number: slot for number, slot in self.slots.items() if number in self._copies}

    def anew(self) -> None:
        """Nothing that kernels know is where it was. To be called when slots are gone, and nothing lies in them any more."""
        self._held = Held(len(self.experts), self.card.views(self.experts[0]), self.card.device)
        self._held.hold(self._copies)

    def _beside(self, x: Tensor, shares: Tensor, chosen: Tensor, limit: float, out: Tensor) -> Tensor:
        """Adds what the CPU computes. x, shares and chosen are the host's."""
        for made in (shares, chosen):
            alloc.held(made)
        part = routed_experts(x, shares, chosen, self.experts, limit)
        return by_torch(lambda: out.add_(self.card.to_card(part)))

    def _staged(self, x: Tensor, shares: Tensor, chosen: Tensor, missing: Tensor, limit: float, out: Tensor) -> Tensor:
        """Adds what the card computes with experts that only pass through: `missing`, sorted. shares and chosen: the host's."""
        for group in missing.split(self.card.staged):
            among = torch.isin(chosen, group)
            tokens = among.any(1).nonzero()[:, 0]
            places = torch.searchsorted(group, chosen[tokens]).clamp(max=len(group) - 1)
            own = [self.card.to_card(each) for each in (tokens, *picked(shares[tokens], places, among[tokens]))]
            experts = self.card.bring([self.experts[number] for number in group.tolist()])
            part = routed_experts(x[own[0]], own[1], own[2], experts, limit)
            self.card.read()
            out.index_add_(0, own[0], part)  # each token once, so there is one order
        return out


def picked(shares: Tensor, numbers: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's choices those that are wanted, in their order: shares and numbers [t, most], on the host.

    shares, numbers, wanted (bool) [t, k]; one must be wanted. Who has fewer than others gets shares of 0 in an expert that
    has been read anyway.
    """
    if len(shares) == 1:
        return shares[wanted][None], numbers[wanted][None]
    order = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :int(wanted.sum(1).max())]
    there, numbers_there = wanted.gather(1, order), numbers.gather(1, order)
    own = torch.where(there[:, :1], numbers_there[:, :1], numbers[wanted][0])
    return torch.where(there, shares.gather(1, order), 0), torch.where(there, numbers_there, own)


class TieredExperts:
    """All layers' experts, and which of them lie in slots. Whoever computes or changes that holds the lock."""

    def __init__(self, layers: Sequence[Experts], rooms: Sequence[Room], staged: int,
                 wanted: Iterable[Place] | None = None) -> None:
        """rooms: of the cards that have all layers between them. staged: experts that pass through a card at a time. wanted: what
        goes into slots first; without, every layer's experts by number."""
        self.lock = RLock()
        self.rooms = tuple(rooms)
        largest = [max(slot_bytes(experts[0]) for experts in layers[room.first:room.last]) for room in rooms]
        self.cards = [Card(room.device, room.slots, size, staged, room.slots < (room.last - room.first) * len(layers[0]))
                      for room, size in zip(rooms, largest, strict=True)]
        desks = [Desk(room.device, layers[0][0].w1.shape[1], staged) for room in rooms]
        self.layers = [Tiers(experts, card, desk) for room, card, desk in zip(rooms, self.cards, desks, strict=True)
                       for experts in layers[room.first:room.last]]
        self.layout = 0  # changes with whatever recorded runs know by its address, or how their pieces are cut
        everyone = ((layer, number) for number in range(len(layers[0])) for layer in range(len(layers)))
        self._hold(everyone if wanted is None else wanted)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While a model computes. Afterwards `seen` of each layer says what this pass chose."""
        with self.lock:
            for layer in self.layers:
                layer.seen.clear()
            yield

    def count_whole(self) -> None:
        """To be called behind a single token: what whole layers chose has been seen too."""
        for layer in self.layers:
            if layer.whole:
                layer.seen.append(layer.told)

    def chosen(self, layers: range) -> Iterator[tuple[int, Tensor]]:
        """What these layers chose in the last pass, int64 [t, k] on the host, and forgets it."""
        found = [(number, chosen) for number in layers for chosen in self.layers[number].seen]
        far = [chosen for _, chosen in found if chosen.device.type != "cpu"]
        copied = iter(torch.cat(far).cpu().split([len(each) for each in far]) if far else ())
        for number, chosen in found:
            yield number, chosen if chosen.device.type == "cpu" else next(copied)
        for number in layers:
            self.layers[number].seen.clear()

    @property
    def resident(self) -> list[set[Place]]:
        """What lies in the slots of each card."""
        return [{(layer, number) for layer in range(room.first, room.last) for number in self.layers[layer].slots}
                for room in self.rooms]

    @property
    def lacking(self) -> int:
        """Slots that were wanted, and for which there was no memory."""
        return sum(card.lacking for card in self.cards)

    def replace(self, leaving: Collection[Place], coming: Collection[Place]) -> None:
        """Exchanges experts of one card's layers; of those that come, as many as there are slots then. What an interrupt leaves
        undone, the next exchange can do."""
        with self.lock:
            whole = [layer.whole for layer in self.layers]
            self._release(leaving)
            self._hold(sorted(coming))
            self.layout += whole != [layer.whole for layer in self.layers] or not all(layer.stays for layer in self.layers)
            for layer in self.layers:
                layer.stays = True

    def shrink(self, keep: Sequence[Place] = ()) -> int:
        """Frees a piece of each card's slots; returns how many slots were lost. keep: what to move elsewhere first, if it lay
        there: the dearest first."""
        with self.lock:
            settle()
            self.layout += 1
            return sum(self._shrunk(room, card, keep) for room, card in zip(self.rooms, self.cards, strict=True))

    def _shrunk(self, room: Room, card: Card, keep: Sequence[Place]) -> int:
        lost = set(card.give_back())
        layers = range(room.first, room.last)
        homeless = {(layer, number) for layer in layers for number, slot in self.layers[layer].slots.items() if slot in lost}
        self._release(homeless)
        for layer in self.layers[room.first:room.last] if lost else ():
            layer.anew()
        dear = [place for place in keep if place[0] in layers][:len(card.slots)]
        coming = [place for place in dear if place in homeless]
        there = {(layer, number) for layer in layers for number in self.layers[layer].slots}
        self._release(sorted(there - set(dear))[:len(coming)])
        self._hold(coming)
        return len(lost)

    def _release(self, places: Iterable[Place]) -> None:
        """Nobody computes with these copies any more, so that their slots can be written."""
        for layer, numbers in _by_layer(places).items():
            self.layers[layer].release(numbers)

    def _hold(self, wanted: Iterable[Place]) -> None:
        """Copies experts into the slots that are free, as far as they go."""
        free = [self._free(room, card) for room, card in zip(self.rooms, self.cards, strict=True)]
        owners = [number for number, room in enumerate(self.rooms) for _ in range(room.first, room.last)]
        dealt = [(place, free[owners[place[0]]].pop()) for place in wanted if free[owners[place[0]]]]
        slots = dict(dealt)
        for layer, numbers in _by_layer(slots).items():
            self.layers[layer].hold(numbers, [slots[layer, number] for number in numbers])

    def _free(self, room: Room, card: Card) -> list[int]:
        taken = {slot for layer in self.layers[room.first:room.last] for slot in layer.slots.values()}
        return [slot for slot in reversed(card.slots) if slot not in taken]


def _by_layer(places: Iterable[Place]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, number in places:
        found.setdefault(layer, []).append(number)
    return found
