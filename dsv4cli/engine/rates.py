"""How fast a model will decode: what a token needs, and what a machine needs for that. Nothing here needs torch.

A token's time is a sum over what it multiplies: of each format the bytes, at the rate that its kernel reaches or at that of the
memory they come from, whichever takes longer; attention and index scores by multiply-adds; and what is lost in each layer
and once a token. Every rate is measured (engine.machine.Profile) or an assumption that its user states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv4_quant.files.headers import Header
from dsv4cli.engine.cards import UNREAD
from dsv4cli.engine.machine import Profile
from dsv4cli.engine.memory import MemoryPlan
from dsv4cli.model import sizes

OFFICIAL = {"F8_E4M3": "fp8_e4m3", "I8": "fp4"}  # stored types, as formats
SCALES = "F8_E8M0"
TABLES = ("i32", "i64")  # of experts by token, of which a row is read
UNMEASURED = "dsv4 doctor --measure would tell"
EXACT = 1.15  # by how much a foretold rate may be wrong; docs/placement.md has how wrong it was


@dataclass(frozen=True)
class Work:
    """What one token needs behind a context: bytes by format, and multiply-adds."""

    layers: int
    dense: Mapping[str, int]  # of the weights that every token reads
    chosen: Mapping[str, int]  # of a token's routed experts, over all layers
    caches: int  # bytes
    attended: int  # multiply-adds of attention
    scored: int  # of indexers

    @property
    def nbytes(self) -> int:
        return sum(self.dense.values()) + sum(self.chosen.values()) + self.caches


@dataclass(frozen=True)
class Costs:
    """Seconds that one machine takes for the parts of a token."""

    dense: float  # a layer's share of all that is computed before its experts are chosen, head and caches among it
    shared: float  # the shared expert of a layer
    hit: float  # an expert in VRAM
    near: float  # an expert in RAM, computed by the CPU
    far: float  # an expert on the disk, read and then computed by the CPU
    lost: float  # in every layer: calls, launches, what is too small to be counted
    token: float = 0.0  # lost once
    card: bool = False  # a card computes what is dense and the experts that it has, the CPU the others beside it
    parted: float = 0.0  # lost more in a layer that is not whole on the card, in which the CPU has a part
    beside: float = 0.0  # lost there by the card while the CPU does its part
    read: float = 0.0  # until the CPU knows that layer's choice
    join: float = 0.0  # until the card goes on, with what the CPU computed

    def layer(self, hits: int, near: int, far: int, whole: bool) -> float:
        """Of one layer whose token chose so many experts in each tier. With a card the shared expert and the hits are computed
        there while the CPU reads the choice and computes the others, if any. A layer that is whole is read by nobody."""
        others = near * self.near + far * self.far
        if not self.card:
            return self.lost + self.dense + self.shared + others
        on_card = self.shared + hits * self.hit
        if whole:
            return self.lost + self.dense + on_card
        return self.lost + self.parted + self.dense + max(self.beside + on_card, self.read + others + self.join)


def work_of(header: Header, depth: int, numerics: str) -> Work:
    """Of a token behind `depth` others, as the file stores the weights."""
    config, dense, chosen = header.config, Counter[str](), Counter[str]()
    for role, infos in header.by_role().items():
        for info in infos if role not in (*UNREAD, "embed") else ():
            if role == "routed_expert":
                chosen[_format(info.dtype, "fp4")] += info.nbytes
            elif info.dtype.lower() not in TABLES:
                dense[_format(info.dtype, "fp8_e4m3")] += info.nbytes
    share = config.num_experts_per_tok / config.n_routed_experts
    weights = Work(config.num_hidden_layers, dense, {name: int(size * share) for name, size in chosen.items()}, 0, 0, 0)
    return _behind(weights, header, depth, numerics)


def _behind(weights: Work, header: Header, depth: int, numerics: str) -> Work:
    """The work with such weights behind `depth` tokens."""
    config, read = header.config, Counter[str]()
    for layer in range(config.num_hidden_layers):
        read += _looked_at(header, layer, depth)
    return replace(weights, attended=2 * config.num_attention_heads * config.head_dim * read["keys"],
                   scored=config.index_n_heads * config.index_head_dim * read["index"],
                   caches=sizes.CACHE_BYTES[numerics] * (read["keys"] * config.head_dim + read["index"] * config.index_head_dim))


def _format(dtype: str, scaled: str) -> str:
    """scaled: the format whose scales lie apart as E8M0."""
    return scaled if dtype == SCALES else OFFICIAL.get(dtype, dtype.lower())


def _looked_at(header: Header, layer: int, depth: int) -> Counter[str]:
    """Keys that a token's attention reads in a layer, and index keys that are scored."""
    config = header.config
    ratio = config.ratio(layer)
    entries = depth // ratio if ratio else 0
    scored = entries if ratio == sizes.OVERLAPPING and entries > config.index_topk else 0
    return Counter({"keys": min(depth + 1, config.sliding_window) + (config.index_topk if scored else entries), "index": scored})


def cpu_seconds(work: Work, profile: Profile) -> tuple[float, float] | None:
    """Of everything but routed experts, and of a token's routed experts, all in RAM; None where a rate was not measured."""
    known = profile.kernels.keys() >= {*work.dense, *work.chosen}
    if not (known and profile.memory and profile.attention and profile.index):
        return None
    dense = sum(size / min(profile.memory, profile.kernels[name]["streamed"]) for name, size in work.dense.items())
    chosen = sum(size / min(profile.memory, profile.kernels[name]["experts"]) for name, size in work.chosen.items())
    beside = work.caches / profile.memory + work.attended / profile.attention + work.scored / profile.index
    return dense + beside, chosen


def cpu_costs(work: Work, profile: Profile, visits: int, disk: float | None = None) -> Costs | None:
    """Of a machine whose CPU computes everything; None where its profile lacks a rate. visits: experts that a token chooses
    in a layer. disk: bytes a second of reading experts from there."""
    found = cpu_seconds(work, profile)
    if found is None or profile.layer_s is None or profile.token_s is None:
        return None
    dense, chosen = found
    near = chosen / (work.layers * visits)
    far = near + (sum(work.chosen.values()) / (work.layers * visits) / disk if disk else 0.0)
    return Costs(dense / work.layers, 0.0, near, near, far, profile.layer_s, profile.token_s)


@dataclass(frozen=True)
class Foretold:
    """Tokens a second from `low` to `high`, and in words where the numbers come from, or why there are none."""

    low: float | None
    high: float | None
    why: str

    @classmethod
    def nothing(cls, why: str = "nobody asked") -> Foretold:
        return cls(None, None, why)

    def told(self) -> str:
        if self.low is None or self.high is None:
            return f"not known: {self.why}"
        return f"about {_short(self.low)} to {_short(self.high)} tok/s ({self.why})"

    def brief(self) -> str:
        """For a panel: the range, or what would find it out; "" where nothing would."""
        if self.low is None or self.high is None:
            return f"not measured: {self.why}" if self.why == UNMEASURED else ""
        return f"about {_short(self.low)} to {_short(self.high)} tok/s, the lower with a full context"


def foretell(header: Header, plan: MemoryPlan, numerics: str, profile: Profile | None) -> Foretold:
    """How fast this machine will decode with that plan.

    From a full context, at the disk's rate for scattered pieces, to an empty one, at that of reading in order; a rate may be
    wrong by EXACT either way.
    """
    if not plan.runs:
        return Foretold.nothing("it does not fit")
    if plan.expands:
        return Foretold.nothing("so small a model waits for its calls more than for its weights")
    if plan.cards:
        return Foretold.nothing("no GPU has been measured yet")
    if profile is None or not profile.kernels:
        return Foretold.nothing(UNMEASURED)
    visits, away = header.config.num_experts_per_tok, plan.on_disk / plan.experts if plan.experts else 0.0
    found, weights = [], work_of(header, 0, numerics)
    for depth, disk in ((plan.context - 1, profile.random), (0, profile.sequential)):
        work = _behind(weights, header, depth, numerics)
        costs = cpu_costs(work, profile, visits, disk)
        if costs is None or (away and not disk):
            return Foretold.nothing("a rate that it needs could not be measured here")
        expected = (1 - away) * costs.layer(0, visits, 0, False) + away * costs.layer(0, 0, visits, False)
        found.append(1 / (work.layers * expected + costs.token))
    return Foretold(found[0] / EXACT, found[1] * EXACT, f"by what dsv4 doctor --measure found on {profile.date}; the lower with "
                    f"{plan.context:,} tokens of context")


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
