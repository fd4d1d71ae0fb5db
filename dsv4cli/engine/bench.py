"""How fast a model computes here, beside the bound that memory sets: every weight of a token has to be read once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels import backends
from dsv4_quant.config import ModelConfig
from dsv4_quant.files import open_source
from dsv4cli.engine import opening
from dsv4cli.engine.engine import use_threads
from dsv4cli.errors import UsageError
from dsv4cli.model.sizes import row_bytes
from dsv4cli.model.state import Snapshot, State
from dsv4cli.model.transformer import Model
from dsv4cli.model.weights import leaves
from dsv4cli.registry import catalog

WARM_UP = 4  # tokens before the first measurement: pages are mapped, buffers made
STRETCH = 4  # tokens that are decoded between two looks at the bandwidth
BUFFER, LOOK = 1 << 29, 1 << 28  # bytes of memory that a look reads in, and that it reads: some ten milliseconds


@dataclass(frozen=True)
class Plan:
    """What to measure: a prompt of `prompt` tokens and then `gen` single ones, each after `depth` tokens of context."""

    prompt: int = 512
    gen: int = 64
    depths: Sequence[int] = (0,)
    repeat: int = 3

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that cannot be measured."""
        for name in ("prompt", "gen", "repeat"):
            if getattr(self, name) < (name == "repeat"):
                raise UsageError(f"--{name} is {getattr(self, name)}.", f"Give {int(name == 'repeat')} or more.")
        if not self.prompt and not self.gen:
            raise UsageError("There is nothing to measure with --prompt 0 and --gen 0.", "Give one of them.")
        if not self.depths or min(self.depths) < 0:
            raise UsageError("A depth is a number of tokens, 0 or more.", "For example: --depth 0,16384")

    @property
    def longest(self) -> int:
        return max(self.depths) + max(self.prompt, self.gen) + WARM_UP


@dataclass(frozen=True)
class Row:
    """Rates at one depth: medians in tokens per second, None where nothing was asked for. Bytes are those a single token
    reads, bandwidth (10^9 bytes a second) is measured between the tokens, the bound is one over the other.

    Where others use the memory too, its bandwidth wavers by half within minutes, and a bound of another moment says little. So
    tokens are decoded in short stretches, with a look at the bandwidth before and after each, which no rate counts.
    """

    prompt_tokens: int
    gen_tokens: int
    depth: int
    prompt_tok_s: float | None
    decode_tok_s: float | None
    bytes_per_token: int
    bandwidth_gb_s: float | None
    bound_tok_s: float | None


def measure(name: str, plan: Plan, *, numerics: str = "official", device: str = "auto", vram: Sequence[int] = (),
            threads: int | None = None, report: Callable[[int, int], None] | None = None) -> Iterator[Row]:
    """Measures a model by alias or path, which needs no tokenizer: the tokens are random, the same in every run.

    Raises UsageError, CapacityError before anything is loaded that does not fit, and what the reader raises.
    """
    entry = catalog.resolve(name)
    source = open_source(entry.located())
    if plan.longest > source.config.max_position_embeddings:
        raise UsageError(f"{plan.longest} tokens do not fit into {entry.name}'s {source.config.max_position_embeddings}.",
                         "Choose a smaller --depth.")
    place = opening.place_of(source, entry.name, plan.longest, numerics, device, vram)
    use_threads(threads, place.plan)
    opening.read_ahead(source, place.plan)
    model = Model.bind(source, numerics=numerics, device=place.device, rooms=opening.rooms_of(place))
    for number, depth in enumerate(plan.depths):
        if report:
            report(number, len(plan.depths))
        yield _row(model, plan, depth)


def _row(model: Model, plan: Plan, depth: int) -> Row:
    ids = torch.randint(0, model.config.vocab_size, (plan.longest,), generator=torch.Generator().manual_seed(1))
    state = model.new_state(plan.longest)
    state.reserve(plan.longest)
    if depth:
        model.forward(ids[:depth], state, logits="none")
    start, later = state.snapshot(), ids[depth:]
    _decode(model, state, start, later[:WARM_UP])
    prompts = [_prompt(model, state, start, later[:plan.prompt]) for _ in range(plan.repeat if plan.prompt else 0)]
    look, decodes, speeds = _looker(model), [], []
    for _ in range(plan.repeat if plan.gen else 0):
        seconds, speed = _decode(model, state, start, later[:plan.gen], look)
        decodes.append(seconds)
        speeds.append(speed)
    bandwidth = statistics.median(speeds) if any(speeds) else None
    nbytes = bytes_per_token(model, depth)
    return Row(plan.prompt, plan.gen, depth, plan.prompt / statistics.median(prompts) if prompts else None,
               plan.gen / statistics.median(decodes) if decodes else None, nbytes,
               bandwidth / 1e9 if bandwidth else None, bandwidth / nbytes if bandwidth else None)


def _looker(model: Model) -> Callable[[], float]:
    """What measures the bandwidth of reading memory at the moment it is called. It finds 0 without kernels to read with, and of a
    card's memory nothing is known here."""
    if model.device.type != "cpu" or backends.cpu_trouble() is not None:
        return float
    reader = backends.reader(BUFFER)
    return lambda: reader.rate(LOOK)


def _prompt(model: Model, state: State, start: Snapshot, ids: Tensor) -> float:
    state.restore(start)
    began = time.perf_counter()
    model.forward(ids, state).cpu()
    return time.perf_counter() - began


def _decode(model: Model, state: State, start: Snapshot, ids: Tensor,
            look: Callable[[], float] = float) -> tuple[float, float]:
    """Seconds for one token after the other, as in a chat, where each waits for the logits of the one before; and the bandwidth
    at which reading alone would have taken as long as at those seen around each stretch."""
    state.restore(start)
    seconds, reading, before = 0.0, 0.0, look()
    for stretch in ids.split(STRETCH):
        began = time.perf_counter()
        for token in stretch.split(1):
            model.forward(token, state).cpu()
        seconds += time.perf_counter() - began
        after = look()
        reading += 2 * len(stretch) / (before + after) if before else 0.0
        before = after
    return seconds, len(ids) / reading if reading else 0.0


def bytes_per_token(model: Model, depth: int) -> int:
    """Bytes that decoding one token after `depth` others has to read: all weights but those of experts that were not
    chosen and of other tokens' embeddings, and the caches that it looks at."""
    weights, config = model.weights, model.config
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    total = _nbytes((weights.head, weights.norm, weights.hc_head)) + weights.embed.nbytes // config.vocab_size
    for layer in weights.layers:
        moe = layer.moe
        total += _nbytes((layer.attn_norm, layer.ffn_norm, layer.hc_attn, layer.hc_ffn, layer.attention))
        total += _nbytes((moe.gate, moe.bias, moe.shared)) + _nbytes(moe.experts) * chosen // experts
    return total + _cache_bytes(config, depth, row_bytes(config, model.numerics.name, packed=model.packs))


def _cache_bytes(config: ModelConfig, depth: int, rows: tuple[int, int]) -> int:
    """rows: bytes of a K=V vector and of an index key."""
    (key, index), total = rows, 0
    for ratio in map(config.ratio, range(config.num_hidden_layers)):
        total += min(depth + 1, config.sliding_window) * key
        entries = depth // ratio if ratio else 0
        if ratio == 4 and entries > config.index_topk:
            total += entries * index
            entries = config.index_topk
        total += entries * key
    return total


def _nbytes(node: object) -> int:
    return sum(leaf.nbytes for leaf in leaves(node))
