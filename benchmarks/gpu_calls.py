"""Calls of every door that a model on a card goes through, at Flash's sizes: what `benchmarks.gpu` times and compares with `ref`.

A maker yields calls of one door for a number of tokens, and of a format where it asks for one. Tensors lie on the generator's
device and are made when their turn comes. Caches are packed, as they are on cards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor

from dsv4_kernels.attention import Entries
from dsv4_kernels.cache import Rounding
from dsv4_kernels.cache.packed import index_bytes, kv_bytes, pack_index, pack_kv, unpack_index, unpack_kv
from dsv4_kernels.compressor import Pending
from dsv4_kernels.held import Held, Told
from dsv4_kernels.hyper import HyperSettings, Mixer
from dsv4_kernels.linear import Norm
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.norm_rope import Placed, frequencies
from dsv4_kernels.prologue import Compression, Keeping, Queries
from dsv4_kernels.residual import Residual
from dsv4_kernels.rounding import ref as rounding
from dsv4_kernels.router import Router
from dsv4_kernels.sampling import Filters
from dsv4_kernels.unpack import LAYOUTS
from dsv4_quant.formats import FORMATS, Packed
from tools.random_weights import packed
from tools.tune import EXPERTS

SETTINGS = HyperSettings(1e-6, 1e-6, 20)
LIMIT, SCALE = 10.0, 1.5  # of hidden values, of experts' shares
DENSE = "q8_0"  # matrices that are no experts, in every recipe
FILTERS = {"greedy": Filters(0.0), "temperature": Filters(0.8), "top-k": Filters(0.8, top_k=40),
           "top-k, top-p, min-p": Filters(0.8, top_k=400, top_p=0.95, min_p=0.01)}


class Sizes(NamedTuple):
    """Flash's, and how much of it is asked for."""

    d: int
    q_rank: int
    queries: int  # rows of wq_b
    width: int
    experts: int
    slots: int
    heads: int
    head: int
    turned: int  # values of a head that are turned
    index_heads: int
    index_head: int
    topk: int
    groups: int  # of wo_a
    o_rank: int
    window: int
    vocabulary: int
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    gen: int
    warm: int  # tokens that are decoded before any is timed; with 9, those of both usual kinds are recorded by then


FLASH = Sizes(4096, 1024, 32768, 2048, 256, 6, 64, 512, 64, 64, 128, 512, 8, 1024, 128, 129280, (1, 8, 512), (128, 4096, 131072),
              8192, 64, 9)
SMALL = Sizes(64, 256, 16, 64, 2, 1, 2, 80, 16, 2, 32, 2, 2, 32, 8, 300, (1, 9), (9,), 5, 1, 0)


def first(found: Any, given: tuple[Any, ...]) -> Tensor:
    """What a call computed: the first of what its door returns."""
    return found if isinstance(found, Tensor) else found[0]


class Call(NamedTuple):
    """A door with what it is given, and what its kernels have to move (bytes) and to multiply at least."""

    op: str
    door: str
    given: tuple[Any, ...]
    nbytes: float
    operations: float
    tokens: int
    format: str = ""
    context: int | None = None
    filled: tuple[int, ...] = ()  # which of what is given the door writes into
    seen: Callable[[Any, tuple[Any, ...]], Tensor] = first

    def run(self, backend: str = "gpu") -> Any:
        """By "gpu" or "ref"."""
        return getattr(import_module(f"dsv4_kernels.{self.op}.{backend}"), self.door)(*self.given)

    def computed(self, backend: str) -> Tensor:
        """The same, but nothing that was given changes."""
        own = self._replace(given=tuple(_copy(each) if number in self.filled else each for number, each in enumerate(self.given)))
        return own.seen(own.run(backend), own.given)


Maker: TypeAlias = Callable[[Sizes, int, Generator, str], Iterator[Call]]


def _copy(given: Any) -> Any:
    if isinstance(given, list):
        return [_copy(each) for each in given]
    return given.clone() if isinstance(given, Tensor) else type(given)(*map(_copy, given)) if isinstance(given, tuple) else given


def _normal(random: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _turns(random: Generator, tokens: int, pairs: int) -> Tensor:
    return torch.polar(torch.ones(tokens, pairs, device=random.device), _normal(random, tokens, pairs))


def _keys(s: Sizes, random: Generator, count: int) -> Tensor:
    return pack_kv(rounding.round_kv(_normal(random, count, s.head), s.turned), s.turned)


def _linear(s: Sizes, tokens: int, random: Generator, name: str) -> Iterator[Call]:
    weight, x = packed(name, s.queries, s.q_rank, random), _normal(random, tokens, s.q_rank)
    yield Call("linear", "linear", (x, weight), weight.nbytes + 4 * tokens * (s.q_rank + s.queries),
               2 * tokens * s.queries * s.q_rank, tokens, name)


def _linears(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """What a layer of ratio 4 makes of its input, and of the latent query; the model's head; `wo_a`, by groups."""
    x, latent = _normal(random, tokens, s.d), _normal(random, tokens, s.q_rank)
    width, norm = max(s.d, FORMATS[DENSE].block), Norm(1 + 0.1 * _normal(random, s.q_rank), 1e-6)
    own = [packed(DENSE, rows, width, random) for rows in (s.q_rank, s.head)]
    own += [packed("bf16", rows, width, random) for rows in (2 * s.head, 2 * s.head, 2 * s.index_head, 2 * s.index_head,
                                                             s.index_heads)]
    queries = [packed(DENSE, rows, s.q_rank, random) for rows in (s.queries, s.index_heads * s.index_head)]
    head, out_norm = packed(DENSE, s.vocabulary, width, random), Norm(1 + 0.1 * _normal(random, s.d), 1e-6)
    whole = (("of x", x, own, None), ("of the latent", latent, queries, norm), ("head", x, [head], out_norm))
    for what, given, weights, by in whole[:3 if tokens == 1 else 2]:
        rows = sum(weight.shape[0] for weight in weights)
        yield Call("linear", "linears", (given, weights, by), sum(weight.nbytes for weight in weights) + given.nbytes
                   + 4 * tokens * rows, 2 * tokens * rows * given.shape[1], tokens, what,
                   seen=lambda found, _: torch.cat(found, -1))
    wo_a, grouped = packed(DENSE, s.groups * s.o_rank, s.d, random), _normal(random, tokens, s.groups, s.d)
    yield Call("linear", "grouped_linear", (grouped, wo_a), wo_a.nbytes + grouped.nbytes + 4 * tokens * wo_a.shape[0],
               2 * tokens * wo_a.shape[0] * s.d, tokens, DENSE)
    ids = torch.randint(s.vocabulary, (tokens,), generator=random, device=random.device)
    yield Call("linear", "embed", (ids, head), 2 * 4 * tokens * s.d, 0, tokens, DENSE)


def _bank(s: Sizes, random: Generator, name: str) -> Experts:
    d, width = (max(size, FORMATS[name].block) for size in (s.d, s.width))
    return Experts(Expert(packed(name, width, d, random), packed(name, width, d, random), packed(name, d, width, random))
                   for _ in range(s.experts))


def _bytes_of(experts: Experts, chosen: Tensor) -> int:
    return len(chosen.unique()) * sum(part.nbytes for part in experts[0] if isinstance(part, Packed))


def _moe(s: Sizes, tokens: int, random: Generator, name: str) -> Iterator[Call]:
    experts = _bank(s, random, name)
    d, width = experts[0].w1.shape[1], experts[0].w1.shape[0]
    weights, chosen = _normal(random, tokens, s.experts).softmax(-1).topk(s.slots)
    yield Call("moe", "routed_experts", (_normal(random, tokens, d), weights, chosen, experts, LIMIT),
               _bytes_of(experts, chosen) + 8 * tokens * d, 6 * tokens * s.slots * width * d, tokens, name)
    if name == DENSE:
        yield Call("moe", "shared_expert", (_normal(random, tokens, d), experts[0], LIMIT),
                   _bytes_of(experts, chosen[0, :1]) + 8 * tokens * d, 6 * tokens * width * d, tokens, name)


def _residual(random: Generator, tokens: int, d: int) -> tuple[Residual, int]:
    """Where a sublayer's output goes, and how many bytes that moves."""
    streams, fn = _normal(random, tokens, 4, d), _normal(random, 24, 4 * d) * (4 * d) ** -0.5
    given = Residual(streams, _normal(random, tokens, 4).sigmoid(), _normal(random, tokens, 4, 4).softmax(-1), fn)
    return given, 2 * streams.nbytes + fn.nbytes


def _project(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    wo_b = packed(DENSE, s.d, s.groups * s.o_rank, random)
    (residual, moved), x = _residual(random, tokens, s.d), _normal(random, tokens, wo_b.shape[1])
    yield Call("residual", "project_into_streams", (x, wo_b, residual), wo_b.nbytes + x.nbytes + moved,
               2 * tokens * wo_b.shape[0] * wo_b.shape[1], tokens, DENSE)


def _sublayer(s: Sizes, tokens: int, random: Generator, name: str) -> Iterator[Call]:
    """All of a layer's experts, from the router to the streams; the shared one is DENSE."""
    experts = _bank(s, random, name)
    d, width = experts[0].w1.shape[1], max(s.width, FORMATS[DENSE].block)
    shared = Expert(packed(DENSE, width, d, random), packed(DENSE, width, d, random), packed(DENSE, d, width, random))
    router = Router(packed("bf16", s.experts, d, random), 0.1 * _normal(random, s.experts), None, s.slots, SCALE)
    (residual, moved), x = _residual(random, tokens, d), _normal(random, tokens, d)
    ids = torch.zeros(tokens, dtype=torch.int64, device=random.device)
    chosen = import_module("dsv4_kernels.router.ref").route_learned(x, router.gate, router.bias, s.slots, SCALE)[1]
    nbytes = _bytes_of(experts, chosen) + sum(part.nbytes for part in shared) + router.gate.nbytes + x.nbytes + moved
    yield Call("residual", "experts_into_streams", (x, ids, router, shared, experts, LIMIT, residual), nbytes,
               2 * tokens * d * (3 * (s.slots + 1) * width + s.experts), tokens, name)


def _attention(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """Layers of ratio 4, whose entries are chosen, and of ratio 128, where all are seen; a single token's position is where a
    recorded one's is."""
    for context, ratio in ((context, ratio) for context in s.contexts for ratio in (4, 128)):
        n = max(1, context // ratio)
        q, sink = _normal(random, tokens, s.heads, s.head), _normal(random, s.heads)
        recent, kv = (_keys(s, random, count) for count in (s.window - 1 + tokens, n))
        visible, chosen, seen = torch.full((tokens,), n, device=q.device), None, n
        if ratio == 4:
            seen = min(n, s.topk)
            chosen = torch.rand(tokens, n, generator=random, device=q.device).topk(seen).indices.sort().values
        touched = len(recent) + (n if chosen is None else len(chosen.unique()))
        at = torch.tensor([context], device=q.device) if tokens == 1 else None
        yield Call("attention", "sparse_attention",
                   (q, recent, Entries(kv, visible, chosen), sink, s.window, _turns(random, tokens, s.turned // 2), at, 1e-6),
                   touched * kv.shape[1] + 2 * q.nbytes, 4 * tokens * s.heads * s.head * (s.window + seen), tokens,
                   f"ratio {ratio}", context)


def _indexer(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    for context in s.contexts:
        n = max(1, context // 4)
        q, weights = _normal(random, tokens, s.index_heads, s.index_head), _normal(random, tokens, s.index_heads)
        q, keys = rounding.round_index(q).bfloat16(), pack_index(rounding.round_index(_normal(random, n, s.index_head)))
        yield Call("indexer", "top_indices", (q, weights, keys, torch.full((tokens,), n, device=q.device), s.topk),
                   keys.nbytes + q.nbytes, 2 * tokens * s.index_heads * s.index_head * n, tokens, context=context)


def _hyper(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    (residual, moved), out, norm = _residual(random, tokens, s.d), _normal(random, tokens, s.d), _normal(random, s.d)
    streams, post, across, fn = residual
    mixer = Mixer(fn, _normal(random, 24), _normal(random, 3))
    head = Mixer(fn[:4].contiguous(), _normal(random, 4), _normal(random, 1))
    sums = torch.cat([streams.flatten(1) @ fn.T, streams.square().sum((1, 2))[:, None]], 1)[..., None] / (s.d // 4)
    kept = sums.expand(-1, -1, s.d // 4).contiguous()  # as `residual` leaves them
    once = fn.nbytes + streams.nbytes + out.nbytes
    yield Call("hyper", "mix_streams", (streams, mixer, SETTINGS, norm), once, 0, tokens)
    yield Call("hyper", "mix_streams", (streams, mixer, SETTINGS, norm, kept), streams.nbytes + out.nbytes + kept.nbytes, 0,
               tokens, "with sums")
    yield Call("hyper", "merge_streams", (streams, head, SETTINGS), head.fn.nbytes + streams.nbytes + out.nbytes, 0, tokens)
    yield Call("hyper", "spread_streams", (out, streams, post, across), moved - fn.nbytes + out.nbytes, 0, tokens)


def _norms(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    x, weight = _normal(random, tokens, s.heads, s.head), _normal(random, s.head)
    yield Call("norm_rope", "rms_norm", (x, weight, 1e-6), 2 * x.nbytes, 0, tokens)
    yield Call("norm_rope", "rotate", (x, _turns(random, tokens, s.turned // 2), True), 2 * x.nbytes, 0, tokens)
    near, far = (frequencies(s.turned, theta).to(x.device) for theta in (10_000, 160_000))
    positions = torch.arange(999_999 - tokens, 999_999, device=x.device)
    yield Call("norm_rope", "turns", (positions, far), 8 * tokens * len(far), 0, tokens,
               seen=lambda found, _: torch.view_as_real(found))
    if tokens == 1:
        yield Call("norm_rope", "place_token", (positions, near, far, s.window, (4, 128)), 32 * len(far), 0, tokens, seen=_placed)


def _placed(found: Placed, _: Any) -> Tensor:
    angles = found.window_turns, found.compress_turns, *(entry.turns for entry in found.entries)
    numbers = found.ring_row, *(number for entry in found.entries for number in entry[:2])
    return torch.cat([*(torch.view_as_real(each).flatten() for each in angles), *(1e-6 * number for number in numbers)])


def _rounding(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    x = _normal(random, tokens, s.index_heads, s.index_head)
    yield Call("rounding", "round_index", (x, _turns(random, tokens, s.turned // 2)), 2 * x.nbytes, 0, tokens,
               seen=lambda found, _: found.float())


def _caches(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """Keys as they come into a ring and into a store of index keys, packed."""
    for rounds, width, nbytes in (("kv", s.head, kv_bytes(s.head, s.turned)), ("index", s.index_head, index_bytes(s.index_head))):
        x, to = _normal(random, tokens, width), torch.zeros(tokens, nbytes, dtype=torch.uint8, device=random.device)
        row = torch.zeros(1, dtype=torch.int64, device=x.device) if tokens == 1 else None

        def read(_: Any, given: tuple[Any, ...], rounds: str = rounds) -> Tensor:
            return unpack_kv(given[5], s.turned) if rounds == "kv" else unpack_index(given[5])

        yield Call("cache", "keep_keys", (x, 1 + 0.1 * _normal(random, width), 1e-6, _turns(random, tokens, s.turned // 2),
                                          rounds, to, row), x.nbytes + to.nbytes, 0, tokens, rounds, filled=(5,), seen=read)


def _compressor(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """The last token of a group, or a prompt."""
    for ratio in (4, 128):
        slots, width = Pending.shape(ratio, s.head)
        kv, scores = _normal(random, tokens, width), _normal(random, tokens, width)
        pending = Pending(_normal(random, slots, width), _normal(random, slots, width))
        yield Call("compressor", "compress", (kv, scores, _normal(random, ratio, width), pending, ratio - 1),
                   2 * kv.nbytes + 2 * pending.kv.nbytes, 0, tokens, f"ratio {ratio}", filled=(3,),
                   seen=lambda found, given: torch.cat([found.flatten(), given[3].kv.flatten()]))


def _prologue(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """A single token, the last of its groups, with index queries where there is an indexer."""
    for ratio in (4, 128) if tokens == 1 else ():
        table, at = _turns(random, 1, s.turned // 2), torch.tensor([ratio - 1], device=random.device)

        def keeping(rounds: Rounding, d: int, nbytes: int, table: Tensor = table) -> Keeping:
            to = torch.zeros(2, nbytes, dtype=torch.uint8, device=random.device)
            return Keeping(1 + 0.1 * _normal(random, d), table, rounds, to, torch.ones(1, dtype=torch.int64, device=to.device))

        kv, index = ("kv", s.head, kv_bytes(s.head, s.turned)), ("index", s.index_head, index_bytes(s.index_head))
        parts = []
        for kept in (kv, index)[:2 if ratio == 4 else 1]:
            slots, width = Pending.shape(ratio, kept[1])
            inputs = [_normal(random, rows, width) for rows in (1, 1, ratio, slots, slots)]
            parts.append(Compression(*inputs[:3], Pending(*inputs[3:]), keeping(*kept)))
        queries = Queries(_normal(random, 1, s.index_heads, s.index_head), table, "index") if ratio == 4 else None
        nbytes = sum(2 * part.pending.kv.nbytes + 4 * part.kv.nbytes for part in parts) + (2 * queries.x.nbytes if queries else 0)
        given = (_normal(random, 1, s.head), keeping(*kv), parts, queries, 1e-6, ratio - 1, at)
        yield Call("prologue", "attention_prologue", given, nbytes, 0, tokens, f"ratio {ratio}", filled=(1, 2),
                   seen=partial(_kept, s.turned))


def _kept(turned: int, found: Any, given: tuple[Any, ...]) -> Tensor:
    """Whatever a prologue leaves behind, its caches unpacked."""
    _, keys, parts, *_ = given
    rows = [unpack_kv(keys.to, turned), *(unpack_kv(part.entries.to, turned) if part.entries.rounding == "kv" else
                                          unpack_index(part.entries.to) for part in parts)]
    pending, queries = (part.pending.kv for part in parts), [] if found is None else [found]
    return torch.cat([each.flatten() for each in (*rows, *pending, *queries)])


def _routers(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    gate, x = packed("bf16", s.experts, s.d, random), _normal(random, tokens, s.d)
    table = torch.arange(64 * s.slots, device=x.device).view(64, s.slots) % s.experts
    ids = torch.arange(tokens, device=x.device) % 64
    for door, given in (("route_learned", (x, gate, 0.1 * _normal(random, s.experts), s.slots, SCALE)),
                        ("route_by_hash", (x, gate, table, ids, SCALE))):
        yield Call("router", door, given, gate.nbytes + x.nbytes, 2 * tokens * s.experts * s.d, tokens, "bf16",
                   seen=lambda found, _: found[0].sort().values)  # experts come in any order


def _held(s: Sizes, tokens: int, random: Generator, name: str) -> Iterator[Call]:
    """A layer of which the card holds every other expert; what is told and joined lies in the host's memory."""
    if tokens > 8:
        return
    experts, device = _bank(s, random, name), random.device
    d, width = experts[0].w1.shape[1], experts[0].w1.shape[0]
    held, shared = Held(s.experts, experts[0], device), Expert(*(packed(DENSE, *part.shape, random) for part in experts[0]))
    held.hold({number: experts[number] for number in range(0, s.experts, 2)})
    router = Router(packed("bf16", s.experts, d, random), 0.1 * _normal(random, s.experts), None, s.slots, SCALE)
    weights, chosen = _normal(random, tokens, s.experts).softmax(-1).topk(s.slots)
    (residual, moved), x, out = _residual(random, tokens, d), _normal(random, tokens, d), _normal(random, tokens, d)
    told, part = Told(*map(_of_host, (x, weights, chosen))), _of_host(out)
    ids, here = torch.zeros(tokens, dtype=torch.int64, device=device), chosen[chosen % 2 == 0]
    yield Call("held", "route_and_tell", (x, router, ids, told), router.gate.nbytes + 2 * x.nbytes,
               2 * tokens * s.experts * d, tokens, name, seen=lambda found, _: found[0].sort().values)
    yield Call("held", "held_experts", (x, weights, chosen, shared, held, LIMIT), _bytes_of(experts, here)
               + sum(part.nbytes for part in shared) + 2 * x.nbytes, 6 * (tokens + len(here)) * width * d, tokens, name)
    yield Call("held", "join_part", (out, part, residual), moved + 2 * out.nbytes, 0, tokens, name)


def _of_host(x: Tensor) -> Tensor:
    """A copy that a card reads and writes where it is."""
    return x.cpu().pin_memory() if x.is_cuda else x.clone()


def _sampling(s: Sizes, tokens: int, random: Generator, _: str) -> Iterator[Call]:
    """Always one token; the id must be the reference's own."""
    if tokens == 1:
        logits, marks = 3 * _normal(random, s.vocabulary), torch.zeros(s.vocabulary, dtype=torch.uint8, device=random.device)
        for name, filters in FILTERS.items():
            yield Call("sampling", "sample", (logits, marks, filters, 1 << 51), logits.nbytes + marks.nbytes, 0, tokens, name)


MAKERS: Mapping[str, tuple[tuple[Maker, tuple[str, ...]], ...]] = {  # by operation, each with the formats that it is made for
    "linear": ((_linear, tuple(LAYOUTS)), (_linears, ("",))), "moe": ((_moe, EXPERTS),),
    "residual": ((_project, ("",)), (_sublayer, EXPERTS)), "attention": ((_attention, ("",)),), "indexer": ((_indexer, ("",)),),
    "hyper": ((_hyper, ("",)),), "norm_rope": ((_norms, ("",)),), "rounding": ((_rounding, ("",)),),
    "cache": ((_caches, ("",)),), "compressor": ((_compressor, ("",)),), "prologue": ((_prologue, ("",)),),
    "router": ((_routers, ("",)),), "held": ((_held, EXPERTS),), "sampling": ((_sampling, ("",)),),
}  # fmt: skip
