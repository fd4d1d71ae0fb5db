"""The Triton kernels and a full-size model on the card at hand, beside what the card itself reaches.

    python -m benchmarks.gpu --out benchmarks/results/gpu.csv     everything; run it from the repository's folder
    python -m benchmarks.gpu --only moe                           kernels of one operation (or `model`)
    python -m benchmarks.gpu --gguf FILE                          llama.cpp's llama-bench on that file as well, if it is on PATH
    TRITON_INTERPRET=1 python -m benchmarks.gpu --small           a test of this program, in Triton's interpreter

A kernel's bound is what it has to read and write at the card's read bandwidth, or what it has to multiply at the rate of its bf16
products, whichever takes longer; both are measured first. Each is compared with `ref` on the same card (relative error; of
chosen entries, the share that differs), and the exit code is 1 if one is far from it. The model is Flash with random weights
in the recipe q2, made in the card's memory, or its first layers as many as fit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.flash_l4 import config_of
from benchmarks.rows import append
from dsv4_kernels import backends, tuned
from dsv4_kernels.attention import Entries
from dsv4_kernels.hyper import HyperSettings, Mixer
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.unpack import LAYOUTS
from dsv4_quant.config import ModelConfig
from dsv4_quant.formats import FORMATS, Packed
from dsv4_quant.recipe import named
from dsv4cli.engine.bench import bytes_per_token
from dsv4cli.model.transformer import Model
from tools.random_model import RandomSource
from tools.random_weights import packed
from tools.tune import EXPERTS, NEAR, by_clock, on_card

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("what", "format", "tokens", "context", "ms", "gb_s", "tflop_s", "tok_s", "of_bound", "error", "layers", "card",
          "architecture", "torch", "triton", "commit", "date")
OPERATIONS = ("linear", "moe", "attention", "indexer", "hyper", "norm_rope", "router", "model")
LAYERS = 43  # of Flash
SPARE = 6 << 30  # bytes for caches and for what is computed with
Row = dict[str, Any]


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
    index_heads: int
    index_head: int
    topk: int
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    prompt: int
    gen: int
    warm: int  # tokens that are decoded before any is timed; with 9, those of both usual kinds are recorded by then


FLASH = Sizes(4096, 1024, 32768, 2048, 256, 6, 64, 512, 64, 128, 512, (1, 8, 512), (128, 4096, 131072), 8192, 64, 9)
SMALL = Sizes(64, 256, 16, 64, 2, 1, 2, 16, 2, 16, 2, (1, 9), (4,), 4, 1, 0)


class Ceilings(NamedTuple):
    """Of the card: bytes per second copied (both ways counted) and read, and bf16 operations per second."""

    copy: float
    read: float
    products: float

    def bound(self, nbytes: float, operations: float) -> float:
        """Seconds."""
        return max(nbytes / self.read, operations / self.products)


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

    def computed(self, backend: str) -> Tensor:
        """By "gpu" or "ref"; the first of what it returns."""
        found = getattr(import_module(f"dsv4_kernels.{self.op}.{backend}"), self.door)(*self.given)
        first = found if isinstance(found, Tensor) else found[0]
        return first.sort().values if self.op == "router" else first  # experts come in any order


def ceilings(device: torch.device, timed: Callable[[Callable[[], Tensor]], float]) -> Ceilings:
    large = device.type == "cuda"
    source = torch.ones(1 << (28 if large else 12), device=device)
    to, side = torch.empty_like(source), 8192 if large else 64
    a = torch.randn(side, side, device=device).bfloat16()
    return Ceilings(2 * source.nbytes / (1e-3 * timed(lambda: to.copy_(source))), source.nbytes / (1e-3 * timed(source.sum)),
                    2 * side**3 / (1e-3 * timed(lambda: a @ a)))


def calls(op: str, s: Sizes, random: Generator, formats: Sequence[str]) -> Iterator[Call]:
    made = {"linear": _linears, "moe": _moe, "attention": _attention, "indexer": _indexer, "hyper": _hyper, "norm_rope": _norms,
            "router": _routers}  # fmt: skip
    for tokens in s.tokens:
        yield from made[op](s, tokens, random, formats)


def _normal(random: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _linears(s: Sizes, tokens: int, random: Generator, formats: Sequence[str]) -> Iterator[Call]:
    for name in formats:
        weight, x = packed(name, s.queries, s.q_rank, random), _normal(random, tokens, s.q_rank)
        yield Call("linear", "linear", (x, weight), weight.nbytes + 4 * tokens * (s.q_rank + s.queries),
                   2 * tokens * s.queries * s.q_rank, tokens, name)


def _moe(s: Sizes, tokens: int, random: Generator, formats: Sequence[str]) -> Iterator[Call]:
    for name in (each for each in EXPERTS if each in formats):
        d, width = (max(size, FORMATS[name].block) for size in (s.d, s.width))
        experts = Experts(Expert(packed(name, width, d, random), packed(name, width, d, random), packed(name, d, width, random))
                          for _ in range(s.experts))
        weights, chosen = _normal(random, tokens, s.experts).softmax(-1).topk(s.slots)
        each = sum(part.nbytes for part in experts[0] if isinstance(part, Packed))
        yield Call("moe", "routed_experts", (_normal(random, tokens, d), weights, chosen, experts, 10.0),
                   len(chosen.unique()) * each + 8 * tokens * d, 6 * tokens * s.slots * width * d, tokens, name)


def _attention(s: Sizes, tokens: int, random: Generator, _: Sequence[str]) -> Iterator[Call]:
    """Layers of ratio 4, whose entries are chosen, and of ratio 128, where all are seen."""
    for context, ratio in ((context, ratio) for context in s.contexts for ratio in (4, 128)):
        n = max(1, context // ratio)
        q, sink = _normal(random, tokens, s.heads, s.head), _normal(random, s.heads)
        recent, kv = (_normal(random, count, s.head).bfloat16() for count in (127 + tokens, n))
        visible, chosen, seen = torch.full((tokens,), n, device=q.device), None, n
        if ratio == 4:
            seen = min(n, s.topk)
            chosen = torch.rand(tokens, n, generator=random, device=q.device).topk(seen).indices.sort().values
        touched = len(recent) + (n if chosen is None else len(chosen.unique()))
        yield Call("attention", "sparse_attention", (q, recent, Entries(kv, visible, chosen), sink, 128),
                   2 * touched * s.head + 2 * q.nbytes, 4 * tokens * s.heads * s.head * (128 + seen), tokens,
                   f"ratio {ratio}", context)


def _indexer(s: Sizes, tokens: int, random: Generator, _: Sequence[str]) -> Iterator[Call]:
    for context in s.contexts:
        n = max(1, context // 4)
        q, weights = _normal(random, tokens, s.index_heads, s.index_head), _normal(random, tokens, s.index_heads)
        keys, visible = _normal(random, n, s.index_head).bfloat16(), torch.full((tokens,), n, device=q.device)
        yield Call("indexer", "top_indices", (q, weights, keys, visible, s.topk), keys.nbytes + q.nbytes,
                   2 * tokens * s.index_heads * s.index_head * n, tokens, context=context)


def _hyper(s: Sizes, tokens: int, random: Generator, _: Sequence[str]) -> Iterator[Call]:
    streams, out, norm = _normal(random, tokens, 4, s.d), _normal(random, tokens, s.d), _normal(random, s.d)
    mixer = Mixer(_normal(random, 24, 4 * s.d) * (4 * s.d) ** -0.5, _normal(random, 24), _normal(random, 3))
    post, across = _normal(random, tokens, 4).sigmoid(), _normal(random, tokens, 4, 4).softmax(-1)
    yield Call("hyper", "mix_streams", (streams, mixer, HyperSettings(1e-6, 1e-6, 20), norm),
               mixer.fn.nbytes + streams.nbytes + out.nbytes, 0, tokens)
    yield Call("hyper", "spread_streams", (out, streams, post, across), 2 * streams.nbytes + out.nbytes, 0, tokens)


def _norms(s: Sizes, tokens: int, random: Generator, _: Sequence[str]) -> Iterator[Call]:
    x, weight = _normal(random, tokens, s.heads, s.head), _normal(random, s.head)
    angles = torch.polar(torch.ones(tokens, s.head // 8, device=x.device), _normal(random, tokens, s.head // 8))
    yield Call("norm_rope", "rms_norm", (x, weight, 1e-6), 2 * x.nbytes, 0, tokens)
    yield Call("norm_rope", "norm_rotate", (x, None, 1e-6, angles), 2 * x.nbytes, 0, tokens)


def _routers(s: Sizes, tokens: int, random: Generator, _: Sequence[str]) -> Iterator[Call]:
    gate, x = packed("bf16", s.experts, s.d, random), _normal(random, tokens, s.d)
    yield Call("router", "route_learned", (x, gate, _normal(random, s.experts) * 0.1, s.slots, 1.5), gate.nbytes + x.nbytes,
               2 * tokens * s.experts * s.d, tokens, "bf16")


def measured(call: Call, roof: Ceilings, timed: Callable[[Callable[[], Tensor]], float]) -> Row:
    error = difference(call.computed("gpu"), call.computed("ref"))
    seconds = 1e-3 * timed(lambda: call.computed("gpu"))
    return {"what": f"{call.op}.{call.door}", "format": call.format, "tokens": call.tokens, "context": call.context,
            "ms": 1e3 * seconds, "gb_s": call.nbytes / seconds / 1e9, "tflop_s": call.operations / seconds / 1e12,
            "of_bound": roof.bound(call.nbytes, call.operations) / seconds, "error": error}


def difference(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point():
        return 1 - float(torch.isin(found, expected).float().mean())
    return float((found - expected).norm() / expected.norm())


def flash(layers: int) -> ModelConfig:
    return ModelConfig.from_dict(config_of(layers), "Flash")


def small() -> ModelConfig:
    """Two layers like those of the embedded model, of both kinds of routers."""
    raw = json.loads((ROOT / "dsv4cli/assets/tiny/config.json").read_text(encoding="utf-8"))
    return ModelConfig.from_dict({**raw, "num_hidden_layers": 2, "compress_ratios": [0, 4], "num_nextn_predict_layers": 0,
                                  "vocab_size": 64, "n_routed_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 2,
                                  "hc_sinkhorn_iters": 2}, "small")


def fitting(random: Generator, room: int) -> RandomSource | None:
    """Flash, or its first layers as many as fit into `room` bytes; None where not even three do."""
    source = RandomSource(flash(LAYERS), named("q2"), random)
    sizes = source.sizes()
    layers = next((count for count in range(LAYERS, 2, -1) if sizes[None] + sum(map(sizes.__getitem__, range(count))) < room), 0)
    if not layers:
        return None
    return source if layers == LAYERS else RandomSource(flash(layers), named("q2"), random)


def whole(source: RandomSource, s: Sizes, roof: Ceilings, eager: bool) -> Iterator[Row]:
    """The model's prompt and decode rates; the host reads one number a token. eager: launches are not recorded.

    Raises RuntimeError where logits are no numbers."""
    device = source.random.device
    model = Model.bind(source, expand_limit=0, device=device.type, records=not eager)  # type: ignore[arg-type]  # bind asks no more
    same = {"format": "q2", "layers": len(model.blocks)}

    def waited() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def prompted(tokens: int) -> tuple[Any, Tensor, float]:
        ids = torch.randint(model.config.vocab_size, (tokens,), generator=Generator().manual_seed(tokens))
        state, start = model.new_state(tokens + s.warm + s.gen), waited()
        logits = model.forward(ids, state)
        return state, logits, waited() - start

    if s.warm:
        prompted(s.prompt)  # compiles
    _, _, seconds = prompted(s.prompt)
    yield {**same, "what": "model.prompt", "tokens": s.prompt, "context": 0, "ms": 1e3 * seconds, "tok_s": s.prompt / seconds}
    for context in s.contexts:
        state, logits, _ = prompted(context)
        for _ in range(s.warm):
            logits = model.forward(logits.argmax(-1).cpu(), state)
        start = waited()
        for _ in range(s.gen):
            logits = model.forward(logits.argmax(-1).cpu(), state)
        seconds = (waited() - start) / s.gen
        if device.type == "cuda" and not eager and state.recording.trouble:
            print(f"No CUDA graph: {state.recording.trouble}.")
        if not logits.isfinite().all():
            raise RuntimeError(f"the logits behind {context} tokens are no numbers")
        nbytes = bytes_per_token(model, context)
        yield {**same, "what": "model.decode", "tokens": 1, "context": context, "ms": 1e3 * seconds, "tok_s": 1 / seconds,
               "gb_s": nbytes / seconds / 1e9, "of_bound": roof.bound(nbytes, 0) / seconds}


def rival(file: str | None, s: Sizes) -> Iterator[Row]:
    """What llama-bench reaches on a file with all layers on the card. A line says so where it is not on PATH."""
    program = shutil.which("llama-bench")
    if file is None or program is None:
        print("No rival: " + ("llama-bench is not on PATH." if program is None else "--gguf names the file that it is to run."))
        return
    depths = ",".join(str(context) for context in s.contexts)
    for test in (("-p", str(s.prompt), "-n", "0"), ("-p", "0", "-n", str(s.gen), "-d", depths)):
        command = [program, "-m", file, "-ngl", "999", "-o", "json", *test]
        for row in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout):
            decodes = bool(row["n_gen"])
            yield {"what": f"llama.cpp.{'decode' if decodes else 'prompt'}", "format": Path(file).name,
                   "tokens": 1 if decodes else row["n_prompt"], "context": row.get("n_depth", 0), "tok_s": row["avg_ts"]}


def rows_of(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    s, timed = (SMALL, by_clock) if options.small else (FLASH, on_card)
    random, roof = Generator(device).manual_seed(1), ceilings(device, timed)
    yield {"what": "card.copy", "gb_s": roof.copy / 1e9}
    yield {"what": "card.read", "gb_s": roof.read / 1e9}
    yield {"what": "card.bf16", "tflop_s": roof.products / 1e12}
    formats = ("q8_0", "bf16") if options.small else tuple(LAYOUTS)
    for op in (op for op in OPERATIONS if options.only in ("", op) and op != "model"):
        for call in calls(op, s, random, formats):
            yield measured(call, roof, timed)
    if options.only in ("", "model"):
        torch.cuda.empty_cache()
        source = RandomSource(small(), named("q2"), random) if options.small else \
            fitting(random, torch.cuda.mem_get_info()[0] - SPARE)
        if source is None:
            print("No model: not even three layers fit into the card's memory.")
        else:
            yield from whole(source, s, roof, options.eager)
    yield from rival(options.gguf, s)


def machine(device: torch.device) -> Row:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"card": torch.cuda.get_device_name() if device.type == "cuda" else "", "architecture": tuned.architecture(device),
            "torch": version("torch"), "triton": version("triton"), "commit": commit.stdout.strip(),
            "date": date.today().isoformat()}


def trouble(options: argparse.Namespace) -> str | None:
    """Why this cannot be done here."""
    if (missing := backends.gpu_trouble()) is not None:
        return f"{missing.message} {missing.hint}"
    from dsv4_kernels.gpu import INTERPRETED

    if options.small and not INTERPRETED:
        return "--small is for Triton's interpreter. Set TRITON_INTERPRET=1."
    if options.small and options.out:
        return "Times of Triton's interpreter are not written. Leave out --out, or --small."
    if not options.small and (INTERPRETED or not torch.cuda.is_available()):
        return "There is no card to measure. Only --small runs without one, with TRITON_INTERPRET=1."
    return None


def show(row: Row) -> None:
    def said(name: str) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    print(f"| {' | '.join(said(name) for name in FIELDS[:11])} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=("", *OPERATIONS))
    parser.add_argument("--eager", action="store_true", help="describe every decoded token anew, without CUDA graphs")
    parser.add_argument("--gguf", help="a file for llama-bench")
    parser.add_argument("--small", action="store_true", help="everything small, in Triton's interpreter")
    parser.add_argument("--out", help="CSV to append the rows to")
    options = parser.parse_args(arguments)
    if (why := trouble(options)) is not None:
        print(why, file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.small else "cuda")
    print(f"| {' | '.join(FIELDS[:11])} |\n|{'---|' * 11}")
    about, wrong = machine(device), []
    with backends.interpreted() if options.small else torch.inference_mode():
        for row in rows_of(options, device):
            show(row)
            if options.out:  # at once: what was measured stays if a later one fails
                append(options.out, FIELDS, [row | about])
            if "error" in row and not row["error"] <= NEAR:  # so is NaN
                wrong.append(f"{row['what']} ({row['format']}, {row['tokens']} tokens) is {row['error']:.3g} from the reference")
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
