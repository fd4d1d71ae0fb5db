"""Measure which sizes of tiles suit the card at hand, and keep them in the kernels' table (kernels/dsv4_kernels/tuned.toml).

    python -m tools.tune                                   measure all, print what would change
    python -m tools.tune --write                           measure all and write this architecture's rows
    python -m tools.tune --only moe. --formats q2_k iq2_xxs

Every candidate's result is compared with that of the default sizes before it is timed, at sizes of Flash; whatever has too little
shared memory or too few registers drops out. A row is written for what saves a tenth of the default's time, as clocks wander.
In Triton's interpreter (TRITON_INTERPRET=1) everything is tiny, times mean nothing, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor

from dsv4_kernels import backends, tuned
from dsv4_kernels.attention import Entries
from dsv4_kernels.cache.packed import pack_index, pack_kv
from dsv4_kernels.linear import Weight
from dsv4_kernels.moe import Expert, Experts
from dsv4_kernels.residual import Residual
from dsv4_kernels.router import Router
from dsv4_kernels.tuned import Rows, Sizes
from dsv4_kernels.unpack import LAYOUTS
from dsv4_quant.formats import FORMATS
from dsv4cli.model.recording import Record, alone, recorder
from tools.random_weights import packed

WORTH = 0.9  # of the default's time: what a row has to save
NEAR = 0.02  # relative error of a candidate against the default, both of bf16 products
OVERLAP = 0.99  # of chosen entries: scores that are almost equal may change places
EXPERTS = ("mxfp4", "fp4", "q8_0", "q4_k", "q2_k", "iq2_xxs")  # formats of routed experts
DENSE = ("q8_0", "fp8_e4m3", "bf16")  # and of what every token meets
_FEW: dict[str, tuple[int, ...]] = {"rows": (1, 2, 4, 8), "lanes": (256, 512), "warps": (2, 4, 8), "stages": (0,)}
_MANY: dict[str, tuple[int, ...]] = {"tokens": (64, 128), "rows": (64, 128), "columns": (64, 128), "warps": (4, 8),
                                     "stages": (0, 2)}
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "attention.attend": {"keys": (16, 32, 64), "programs": (128, 256, 512), "warps": (4, 8, 16), "stages": (1, 2)},
    "indexer.choose": {"scan": (1024, 2048, 4096, 8192), "warps": (4, 8, 16), "stages": (0,)},
    "indexer.score": {"keys": (16, 32, 64, 128), "tokens": (8,), "warps": (4, 8), "stages": (0,)},
    "linear.few": _FEW, "linear.many": _MANY, "linear.several": _FEW, "moe.down_few": _FEW, "moe.down_many": _MANY,
    "moe.hidden_few": _FEW, "moe.hidden_many": _MANY, "residual.down": _FEW, "residual.hide": _FEW, "residual.project": _FEW,
    "residual.score": _FEW, "sampling.pieces": {"tokens": (512, 1024, 2048), "warps": (4, 8), "stages": (0,)},
}  # fmt: skip
Run: TypeAlias = Callable[[], Tensor]
Timer: TypeAlias = Callable[[Run], float]


class Trial(NamedTuple):
    """A kernel to be tuned for a format ("" for all), and a call of its door."""

    kernel: str
    format: str
    run: Run

    @property
    def key(self) -> str:
        return f"{self.kernel}:{self.format}" if self.format else self.kernel


class Shapes(NamedTuple):
    """Of the calls that are measured."""

    rows: int
    cols: int
    many: int  # tokens of a prompt
    experts: int
    slots: int
    d: int  # of the model
    width: int  # of an expert
    heads: int
    head: int  # channels of a head
    turned: int  # the last of them, which positions turn
    entries: int
    chosen: int


FLASH = Shapes(32768, 1024, 512, 64, 6, 4096, 2048, 64, 512, 64, 32768, 512)
TINY = Shapes(32, 256, 9, 2, 2, 64, 64, 2, 80, 16, 48, 8)


class Verdict(NamedTuple):
    """What was found of a trial: both times in ms, the best sizes, and how many candidates dropped out (wrong, or do not fit)."""

    key: str
    default_ms: float
    best_ms: float
    sizes: Sizes
    dropped: int

    @property
    def worthwhile(self) -> bool:
        return self.best_ms < WORTH * self.default_ms


def trials(kernels: Sequence[str], formats: Sequence[str], shapes: Shapes, random: Generator) -> Iterator[Trial]:
    """Tensors are made when their turn comes, on the generator's device."""
    for kernel in kernels:
        op, _, rest = kernel.partition(".")
        tokens = shapes.many if rest.endswith("many") else 1
        if op == "linear" and rest != "several":
            for name in (each for each in LAYOUTS if each in formats and (each, rest) != ("f32", "many")):
                yield Trial(kernel, name, _linear(name, tokens, shapes, random))
        elif op == "moe" or rest in ("down", "hide"):
            for name in (each for each in EXPERTS if each in formats):
                yield Trial(kernel, name, (_experts if op == "moe" else _sublayer)(name, tokens, shapes, random))
        elif rest == "project":
            for name in (each for each in DENSE if each in formats):
                yield Trial(kernel, name, _projected(name, shapes, random))
        else:
            made = {"linear": _several, "attention": _attention, "indexer": _indexer, "residual": _scored,
                    "sampling": _sampling}[op]
            yield Trial(kernel, "", made(shapes, random))


def _normal(random: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _linear(name: str, tokens: int, shapes: Shapes, random: Generator) -> Run:
    from dsv4_kernels.linear import gpu

    weight, x = packed(name, shapes.rows, shapes.cols, random), _normal(random, tokens, shapes.cols)
    return lambda: gpu.linear(x, weight)


def _several(shapes: Shapes, random: Generator) -> Run:
    """What a layer's input is projected by: queries and keys, a compressor's two and the index weights."""
    from dsv4_kernels.linear import gpu

    names, x = ("q8_0", "q8_0", "f16", "f16"), _normal(random, 1, shapes.cols)
    weights: list[Weight] = [packed(name, shapes.rows // 32, shapes.cols, random) for name in names]
    return lambda: torch.cat(gpu.linears(x, weights), -1)


def _bank(name: str, shapes: Shapes, random: Generator) -> tuple[Experts, int]:
    """Experts, and the width of what they are given."""
    d, width = (max(size, FORMATS[name].block) for size in (shapes.d, shapes.width))
    return Experts(Expert(packed(name, width, d, random), packed(name, width, d, random), packed(name, d, width, random))
                   for _ in range(shapes.experts)), d


def _experts(name: str, tokens: int, shapes: Shapes, random: Generator) -> Run:
    from dsv4_kernels.moe import gpu

    experts, d = _bank(name, shapes, random)
    x, scores = _normal(random, tokens, d), _normal(random, tokens, shapes.experts)
    weights, chosen = scores.softmax(-1).topk(shapes.slots)
    return lambda: gpu.routed_experts(x, weights, chosen, experts, 10.0)


def _into_streams(d: int, random: Generator) -> Residual:
    """Where a token's output goes."""
    return Residual(_normal(random, 1, 4, d), _normal(random, 1, 4).sigmoid(), _normal(random, 1, 4, 4).softmax(-1),
                    _normal(random, 24, 4 * d) * (4 * d) ** -0.5)


def _projected(name: str, shapes: Shapes, random: Generator) -> Run:
    """A layer's `wo_b`."""
    from dsv4_kernels.residual import gpu

    weight = packed(name, shapes.d, 2 * shapes.d, random)
    residual, x = _into_streams(shapes.d, random), _normal(random, 1, weight.shape[1])
    return lambda: gpu.project_into_streams(x, weight, residual).streams


def _sublayer(name: str, tokens: int, shapes: Shapes, random: Generator) -> Run:
    """A layer's experts, from the router to the streams."""
    from dsv4_kernels.residual import gpu

    experts, d = _bank(name, shapes, random)
    shared = Expert(*(packed(DENSE[0], *part.shape, random) for part in experts[0]))
    router = Router(packed("bf16", shapes.experts, d, random), _normal(random, shapes.experts), None, shapes.slots, 1.5)
    residual, x = _into_streams(d, random), _normal(random, tokens, d)
    ids = torch.zeros(tokens, dtype=torch.int64, device=x.device)
    return lambda: gpu.experts_into_streams(x, ids, router, shared, experts, 10.0, residual).streams


def _scored(shapes: Shapes, random: Generator) -> Run:
    return _sublayer(DENSE[0], 1, shapes, random)


def _attention(shapes: Shapes, random: Generator) -> Run:
    from dsv4_kernels.attention import gpu
    from dsv4_kernels.rounding.ref import round_kv

    q, sink = _normal(random, 1, shapes.heads, shapes.head), _normal(random, shapes.heads)
    recent, kv = (pack_kv(round_kv(_normal(random, count, shapes.head), shapes.turned), shapes.turned)
                  for count in (128, shapes.entries))
    visible = torch.tensor([shapes.entries], device=random.device)
    chosen = torch.randperm(shapes.entries, generator=random, device=random.device)[None, :shapes.chosen].sort().values
    turns = torch.polar(torch.ones(1, shapes.turned // 2, device=q.device), _normal(random, 1, shapes.turned // 2))
    return lambda: gpu.sparse_attention(q, recent, Entries(kv, visible, chosen), sink, 128, turns, visible, 1e-6)


def _indexer(shapes: Shapes, random: Generator) -> Run:
    from dsv4_kernels.indexer import gpu
    from dsv4_kernels.rounding.ref import round_index

    q, weights = round_index(_normal(random, 1, shapes.heads, 128)).bfloat16(), _normal(random, 1, shapes.heads)
    keys, visible = pack_index(round_index(_normal(random, shapes.entries, 128))), torch.tensor([shapes.entries], device=q.device)
    return lambda: gpu.top_indices(q, weights, keys, visible, shapes.chosen)


def _sampling(shapes: Shapes, random: Generator) -> Run:
    from dsv4_kernels.sampling import Filters, gpu

    logits = 3 * _normal(random, 4 * shapes.rows)
    marks = torch.zeros(len(logits), dtype=torch.uint8, device=logits.device)
    return lambda: gpu.sample(logits, marks, Filters(top_k=shapes.chosen, top_p=0.95), 1 << 52)


def candidates(kernel: str, most: int | None = None) -> list[Sizes]:
    """All combinations but the default one, or the last `most` of them, whose programs are the fewest."""
    knobs = CANDIDATES[kernel]
    found: list[Sizes] = [dict(zip(knobs, each, strict=True)) for each in product(*knobs.values())]
    return [each for each in found if each != tuned.default(kernel)][-(most or 0):]


def verdict(trial: Trial, timed: Timer, others: Iterable[Sizes]) -> Verdict:
    """Raises what the trial raises with the default sizes."""
    default = tuned.default(trial.kernel)
    with tuned.instead(trial.kernel, default):
        expected = trial.run()
        before = timed(trial.run)
    best, quickest, dropped = default, before, 0
    for sizes in others:
        with tuned.instead(trial.kernel, sizes):
            if not _same(_result(trial.run), expected):
                dropped += 1
            elif (took := timed(trial.run)) < quickest:
                best, quickest = sizes, took
    with tuned.instead(trial.kernel, default):  # again, for the card is warmer now
        before = min(before, timed(trial.run))
    return Verdict(trial.key, before, min(before, quickest), best, dropped)


def _result(run: Run) -> Tensor | None:
    """None where the card has not enough registers or shared memory, or Triton cannot compile these sizes."""
    from triton.errors import TritonError

    try:
        return run()
    except TritonError:
        return None
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        return None


def _same(found: Tensor | None, expected: Tensor) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return bool(torch.isin(found, expected).float().mean() >= OVERLAP)
    return bool((found - expected).norm() <= NEAR * expected.norm())  # false of NaN


def on_card(run: Run) -> float:
    """Median in ms, with weights out of the card's cache."""
    from triton.testing import do_bench

    run()  # compiles
    return float(do_bench(repeated(run, recorder(torch.device("cuda"))), warmup=10, rep=60, return_mode="median"))


def repeated(run: Run, record: Record | None) -> Run:
    """The same launches as a graph, as decoded tokens are, or describing them would be what is timed; `run` itself where they
    cannot be recorded, as where the host reads something."""
    if record is None:
        return run
    try:
        return alone(record, run).replay
    except RuntimeError:
        return run


def by_clock(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def written(text: str, architecture: str, found: Iterable[Verdict], about: str) -> str:
    """The table's text with this architecture's section anew: fresh rows, and those of what was not measured this time."""
    sections = [""]
    for line in text.splitlines():
        if line.startswith("["):
            sections.append("")
        sections[-1] += line + "\n"
    rows: Rows = tuned.parsed(text)
    verdicts = {each.key: each for each in found}
    own: dict[str, Sizes] = {key: sizes for key, sizes in rows.get(architecture, {}).items() if key not in verdicts}
    own |= {key: each.sizes for key, each in verdicts.items() if each.worthwhile}
    kept = [part.rstrip() for part in sections if not part.startswith(f"[{architecture}]")]
    lines = [f'"{key}" = {{{", ".join(f"{name} = {size}" for name, size in own[key].items())}}}' for key in sorted(own)]
    return "\n\n".join([*kept, "\n".join([f"[{architecture}]", f"# {about}", *lines])]) + "\n"


def _trouble(write: bool, kernels: Sequence[str]) -> str | None:
    """Why this cannot be done here."""
    if (missing := backends.gpu_trouble()) is not None:
        return f"{missing.message} {missing.hint}"
    from dsv4_kernels.gpu import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        return "There is no card to measure. On this machine only TRITON_INTERPRET=1 runs the kernels, to try this program."
    if INTERPRETED and write:
        return "Times of Triton's interpreter are not written. Leave out --write, or TRITON_INTERPRET."
    return None if kernels else f"No kernel's name begins so. There are {', '.join(CANDIDATES)}."


def main(arguments: Sequence[str] | None = None, table: Path = tuned.TABLE) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write this architecture's rows")
    parser.add_argument("--only", default="", help="kernels whose names begin so (linear, moe.down)")
    parser.add_argument("--formats", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    chosen = parser.parse_args(arguments)
    kernels = [kernel for kernel in CANDIDATES if kernel.startswith(chosen.only)]
    if (trouble := _trouble(chosen.write, kernels)) is not None:
        print(trouble, file=sys.stderr)
        return 2
    card = torch.cuda.is_available()
    random = Generator(torch.device("cuda" if card else "cpu")).manual_seed(1)
    found = []
    print("| kernel | default ms | best ms | sizes | dropped |\n|---|---|---|---|---|")
    for trial in trials(kernels, chosen.formats, FLASH if card else TINY, random):
        found.append(each := verdict(trial, on_card if card else by_clock, candidates(trial.kernel, None if card else 1)))
        said = ", ".join(f"{name} {size}" for name, size in each.sizes.items()) if each.worthwhile else "default"
        print(f"| {each.key} | {each.default_ms:.4f} | {each.best_ms:.4f} | {said} | {each.dropped} |", flush=True)
    if chosen.write:
        save(table, found, tuned.architecture(random.device), torch.cuda.get_device_name())
    return 0


def save(table: Path, found: Iterable[Verdict], architecture: str, card: str) -> None:
    import triton

    about = f"{card}, Triton {triton.__version__}, {date.today().isoformat()}"
    fresh = table.with_suffix(".new")
    fresh.write_text(written(table.read_text(encoding="utf-8"), architecture, found, about), encoding="utf-8")
    os.replace(fresh, table)


if __name__ == "__main__":
    sys.exit(main())
