"""The memory plan: what a model will need, what this machine has, and a refusal before the first byte is loaded.

Weights stay in the mapped file and are read through the page cache. They are counted all the same, as far as they are read:
what does not fit is read from the disk again whenever it is needed. Of routed experts a token needs few, so a model runs as
long as everything else fits; other weights would be read again for every token. What a program may use is the smallest of
what the system has available and what the control groups around the process and its own limits leave. With graphics cards
(engine.cards) only the experts for which they have no room are counted here, and what the program itself takes. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsv4_quant.config import ModelConfig
from dsv4_quant.files.headers import Header
from dsv4cli.console import in_bytes
from dsv4cli.engine.cards import UNREAD, Buffers, CardShare, shares
from dsv4cli.errors import CapacityError, UsageError
from dsv4cli.model import sizes

DEFAULT_CONTEXT = 32768
PREFILL_CHUNK = 512  # tokens that are computed together
TILE = 64 << 20  # bytes of scores at once: of attention, and of an indexer
PROGRAM = 275_000_000  # bytes that Python, torch (without CUDA) and this program hold; seen with torch 2.13 on Linux
LOADED_LATER = 20_000_000  # what comes to the program after its plan was made: a tokenizer library, kernels, torch's own buffers
TOKEN_BYTES = 740  # what a tokenizer holds per token: 95 MB for 129,280; seen with tokenizers 0.22
MAPPED_AROUND = 65_536  # bytes that Linux maps at the first touch of a page that it has in its cache
SMALLEST_CONTEXT = 512  # shorter than this, a default context would not be worth opening the model for


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the machine's memory by purpose, and what its cards hold. `available` is None where the system does not tell;
    then nothing is refused. With `cards`, weights, state and scratch are theirs (CardShare), and `experts` are those for
    which they have no slot."""

    context: int  # tokens
    program: int  # Python, torch and what else is loaded before a model is
    vocabulary: int  # the tokenizer
    weights: int  # as stored, mapped from the file, as far as such a context reads them
    expanded: int  # float32 copies of small models
    state: int  # window, compressed entries and compressor state at a full context
    snapshots: int  # the most that a session may keep to go back to
    scratch: int  # the largest temporary tensors of a prompt chunk
    available: int | None
    experts: int = 0  # of the weights: routed experts that may stay on the disk
    busy: int = 0  # of those: what one layer reads for a token, which has to be in memory
    routed: int = 0  # how many routed experts there are, wherever they lie
    pinned: int = 0  # buffers that cards copy from
    cards: tuple[CardShare, ...] = ()

    @property
    def needed(self) -> int:
        """With all weights in memory."""
        return sum(self.sizes().values())

    @property
    def least(self) -> int:
        """With every routed expert on the disk, but those that are being computed."""
        return self.needed - self.experts + self.busy

    @property
    def fits(self) -> bool:
        """Whether all weights stay in memory, or on cards."""
        return self.runs and (self.available is None or self.needed <= self.available)

    @property
    def runs(self) -> bool:
        """Whether the model can be run, if need be with experts on the disk."""
        return (self.available is None or self.least <= self.available) and all(card.runs for card in self.cards)

    @property
    def card(self) -> CardShare | None:
        """The share of the only card, or of the first; None where the model stays on the CPU."""
        return self.cards[0] if self.cards else None

    @property
    def shelf(self) -> int:
        """Bytes that a session's snapshots may take, wherever the state is."""
        return self.snapshots + sum(card.snapshots for card in self.cards)

    @property
    def on_cards(self) -> bool:
        """Whether cards hold every weight."""
        return bool(self.cards) and all(card.runs and card.slots == card.experts for card in self.cards)

    @property
    def expands(self) -> bool:
        """Whether weights are decoded to float32 when they are loaded, wherever they go then."""
        return bool(self.expanded or (self.card and self.card.expanded))

    @property
    def on_disk(self) -> int:
        """Bytes of routed experts for which there is no memory; all but those being computed where the model cannot run."""
        return 0 if self.available is None else min(self.experts - self.busy, max(0, self.needed - self.available))

    def demand_fit(self, name: str) -> None:
        """Raises CapacityError with both numbers if not even experts on the disk would leave room for the rest, or a card has
        too little for what has to be there."""
        for number, card in enumerate(self.cards):
            if not card.runs:
                which = f"GPU {number}" if len(self.cards) > 1 else "the GPU"
                raise CapacityError(
                    f"{name} needs {in_bytes(card.fixed)} of the memory of {which} ({told(card.sizes())}), "
                    f"but only {in_bytes(card.available or 0)} are available.",
                    "Choose a smaller --ctx, a smaller quantisation, or --device cpu.")
        if not self.runs:
            without = f", with {in_bytes(self.experts - self.busy)} of experts left on the disk" if self.experts else ""
            parts = told({**self.sizes(), "routed experts": self.busy})
            raise CapacityError(
                f"{name} needs {in_bytes(self.least)} of memory ({parts}){without}, "
                f"but only {in_bytes(self.available or 0)} are available.",
                "Choose a smaller --ctx, a smaller quantisation, or a machine with more memory.")

    def sizes(self) -> dict[str, int]:
        """Bytes by what they are for, in words."""
        return {"program": self.program, "tokenizer": self.vocabulary, "weights": self.weights - self.experts,
                "routed experts": self.experts, "expanded weights": self.expanded, f"state for {self.context} tokens": self.state,
                "snapshots": self.snapshots, "scratch": self.scratch, "pinned buffers": self.pinned}

    def parts(self) -> str:
        return told(self.sizes())

    def swaps(self, swapped: int) -> bool:
        """Whether so many bytes of others, read back from swap, would leave less than this needs."""
        return self.available is not None and swapped > 0 and self.least + swapped > self.available

    def experts_told(self) -> str:
        """Where the routed experts will be, in words; "" where all of them fit into memory."""
        if not self.on_disk:
            return ""
        kept = in_bytes(self.experts - self.on_disk)
        return f"experts in RAM: {kept} of {in_bytes(self.experts)}, the rest is read from the disk"


def told(sizes: dict[str, int]) -> str:
    """Sizes with their purposes, in words; what is 0 is left out."""
    return ", ".join(f"{what} {in_bytes(size)}" for what, size in sizes.items() if size)


def plan_model(header: Header, name: str, *, ctx: int | None, numerics: str, available: int | None,
               program: int = PROGRAM, decodes: bool = False, cards: Sequence[int | None] = ()) -> MemoryPlan:
    """The plan for `ctx` tokens, or, with ctx None, for the longest default that fits (halving from DEFAULT_CONTEXT): with all
    weights in memory, else with experts on the disk; the smallest where neither fits. Nobody is refused here: see
    MemoryPlan.demand_fit.

    program: bytes that the program holds before it opens a model. decodes: there are no kernels for packed weights, so
    that a matrix has to be decoded for each product. cards: bytes that may be used of each card that is to compute; without
    any, the CPU does. Raises UsageError for a context the model does not have.
    """
    config = header.config
    longest = config.max_position_embeddings
    if ctx is not None and not 1 <= ctx <= longest:
        raise UsageError(f"A context of {ctx} tokens was asked for, but {name} allows 1 to {longest}.",
                         f"Choose --ctx between 1 and {longest}.")
    weights = _Weights.of(header)
    expanded = sizes.expanded_bytes(config, header.tensor_bytes)
    experts = 0 if expanded else weights.experts  # expanded ones lie in memory, whatever becomes of the file's
    count = config.n_routed_experts * config.num_hidden_layers
    busy = experts * config.num_experts_per_tok // count
    scratch, vocabulary = _scratch_bytes(config, decodes and not expanded), TOKEN_BYTES * config.vocab_size

    def plan(tokens: int) -> MemoryPlan:
        if cards:
            buffers = Buffers(_scratch_bytes(config, decodes=False), _index_scores(config, tokens))
            dealt = shares(header, cards, tokens, numerics, buffers)
            left = max(0, experts - sum(card.slots * card.expert for card in dealt))
            here = MemoryPlan(tokens, program, vocabulary, left, 0, 0, 0, 0, available, left, min(left, busy), count)
            return replace(here, pinned=max(card.staging for card in dealt), cards=dealt)
        state = sizes.state_bytes(config, tokens, numerics)
        return MemoryPlan(tokens, program, vocabulary, weights.read_by(tokens), expanded, state, state, scratch, available,
                          experts, busy, count)

    plans = [plan(ctx or min(DEFAULT_CONTEXT, longest))]
    while ctx is None and not plans[-1].fits and plans[-1].context // 2 >= SMALLEST_CONTEXT:
        plans.append(plan(plans[-1].context // 2))
    return next((made for made in plans if made.fits), None) or next((made for made in plans if made.runs), plans[-1])


@dataclass(frozen=True)
class _Weights:
    """Stored bytes: the table of embeddings, and all else that the trunk reads. Other stages are left on the disk."""

    embedding: int
    others: int  # routed experts among them
    experts: int

    @classmethod
    def of(cls, header: Header) -> _Weights:
        nbytes = {role: sum(info.nbytes for info in infos) for role, infos in header.by_role().items()}
        unread = sum(nbytes.get(role, 0) for role in UNREAD)
        embedding = nbytes.get("embed", 0)
        return cls(embedding, header.tensor_bytes - unread - embedding, nbytes.get("routed_expert", 0))

    def read_by(self, tokens: int) -> int:
        """Of the table only the rows of tokens that occur, each with the pages that the system maps around it."""
        return self.others + min(self.embedding, tokens * MAPPED_AROUND)


def _scratch_bytes(config: ModelConfig, decodes: bool) -> int:
    """The largest temporary tensors, float32: the widest activations of a prompt chunk, and a decoded matrix."""
    widest = max(config.hc_mult * config.hidden_size, config.num_attention_heads * config.head_dim)
    matrix = config.vocab_size * config.hidden_size if decodes else 0
    return 4 * (6 * PREFILL_CHUNK * widest + matrix)


def _index_scores(config: ModelConfig, tokens: int) -> int:
    """Of a prompt chunk's scores of all entries, float32, what a card computes at once; 0 where no layer has an indexer."""
    return min(TILE, 4 * PREFILL_CHUNK * (tokens // sizes.OVERLAPPING)) if sizes.OVERLAPPING in config.compress_ratios else 0


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process may still use, None where nobody tells. Tests put another system at `root`."""
    limits = _from_limits() if root == Path("/") else []
    known = [size for size in (_from_meminfo(root), *_from_cgroups(root), *limits) if size is not None]
    if not known and root == Path("/"):
        known = _from_sysconf()
    return min(known, default=None)


def address_space() -> int | None:
    """Bytes that this process may still map (ulimit -v), None for no limit. Files count whole, read or not."""
    return _left_of("RLIMIT_AS", "VmSize")


def swapped_bytes(root: Path = Path("/")) -> int:
    """What the system has put into swap, 0 where it does not tell. Whoever needs it back takes memory from the others."""
    found = dict(line.split(":", 1) for line in _text(root / "proc/meminfo").splitlines())
    total, free = (int(found.get(name, "0").split()[0]) for name in ("SwapTotal", "SwapFree"))
    return (total - free) * 1024


def resident_bytes() -> int:
    """The process's resident memory, 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def _from_meminfo(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _from_cgroups(root: Path) -> Iterator[int | None]:
    """What each control group around the process leaves: its limit, less what is used and cannot be reclaimed."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _around(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _around(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                               "total_")


def _around(mount: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[int | None]:
    inner = mount / path.strip("/")
    for folder in (inner, *inner.parents):
        yield _left(folder, limit, usage, prefix)
        if folder == mount:
            return


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    most = _text(folder / limit).strip()
    if not most.isdigit():  # absent, or "max"
        return None
    used = int(_text(folder / usage).strip() or 0)
    counters = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
    # The page cache gives way, weights in it too: those that another program maps, or that this one left there yesterday.
    cache = sum(int(counters.get(f"{prefix}{half}_file", 0)) for half in ("inactive", "active"))
    return max(0, int(most) - used + cache)


def _from_limits() -> list[int | None]:
    """What the limits of this process leave: of addresses, and of memory that is no file's (ulimit -v and -d)."""
    return [address_space(), _left_of("RLIMIT_DATA", "VmData")]


def _left_of(limit: str, counter: str) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most, _ = resource.getrlimit(getattr(resource, limit))
    if most == resource.RLIM_INFINITY:
        return None
    used = next((line.split()[1] for line in _text(Path("/proc/self/status")).splitlines() if line.startswith(counter)), "0")
    return max(0, most - int(used) * 1024)


def _from_sysconf() -> list[int]:
    """Physical memory, where there is no /proc: most of it can be made available."""
    try:
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
