"""A model on a card that has slots for a share of its routed experts only: logits, rates, and the bound of each split.

    python benchmarks/tiers.py MODEL [--shares 0,0.25,0.5] [--device cpu|cuda] [--prompt 128] [--tokens 48] [--threads 2]
                               [--out FILE.csv]

With --device cpu (the default) the card is the CPU's memory: the same code, but nothing runs beside anything else, and copies
cost the same memory's time. First comes the model with everything in one place; on a card that is too small for that,
--no-whole leaves it out. Tokens are random, so experts are chosen evenly, and a share of slots is about that share of hits. The
bound of a split reads each byte once: dense weights and hits at the card's bandwidth while the CPU reads the others at its own;
with the CPU as the card all of them one after the other. Both bandwidths are measured before and after each run. Official
numerics round to few bits, where another order of sums now and then falls on the other side, and a random model's layers
enlarge that: whether logits are the same is seen with --numerics plain, where exit code 1 says that they differ by more than
--most. **Has not been run on a card yet.**
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import torch
from rows import append
from torch import Tensor

from dsv4_kernels import backends
from dsv4_quant.files import Source, open_source
from dsv4cli.engine.bench import bytes_per_token
from dsv4cli.model.slots import Room
from dsv4cli.model.transformer import Model

WARM_UP = 4  # decoded tokens before the first that is timed


@dataclass(frozen=True)
class Row:
    """Rates in tokens per second; error: relative, of the logits of all decoded tokens, against everything in one place."""

    file: str
    device: str
    slots: int | None  # None: everything in one place
    hits: float  # share of choices whose experts lay in slots
    error: float | None
    prompt_tok_s: float
    decode_tok_s: float
    bound_tok_s: float
    of_bound: float
    numerics: str
    date: str = date.today().isoformat()


def measure(source: Source, name: str, slots: int | None, options: argparse.Namespace,
            whole: Tensor | None) -> tuple[Row, Tensor]:
    """One placement; the logits [tokens, vocab] of the decoded tokens."""
    rooms = [] if slots is None else [Room(options.device, 0, source.config.num_hidden_layers, slots)]
    model = Model.bind(source, device=options.device, expand_limit=0, rooms=rooms, numerics=options.numerics)
    count = options.prompt + WARM_UP + options.tokens
    ids = torch.randint(0, source.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1))
    state = model.new_state(count)
    model.forward(ids[:options.prompt], state, logits="none")  # pages come into memory, kernels are compiled
    state = model.new_state(count)
    began = time.perf_counter()
    model.forward(ids[:options.prompt], state).cpu()
    prompt_s = time.perf_counter() - began
    speeds, logits, seconds, hits, met = [_bandwidths(options.device)], [], [], 0, 0
    for token in ids[options.prompt:].split(1):
        began = time.perf_counter()
        logits.append(model.forward(token, state).cpu())
        seconds.append(time.perf_counter() - began)
        for layer in model.tiers.layers if model.tiers else ():
            chosen = layer.seen[0].flatten().tolist()
            hits, met = hits + sum(number in layer.slots for number in chosen), met + len(chosen)
    speeds.append(_bandwidths(options.device))
    made, rate = torch.cat(logits), 1 / statistics.median(seconds[WARM_UP:])
    share = 1.0 if slots is None else hits / met
    bound = _bound(model, share, [statistics.mean(each) for each in zip(*speeds, strict=True)], options)
    error = None if whole is None else float((made.double() - whole).norm() / whole.double().norm())
    return Row(name, options.device, slots, round(share, 3), error, options.prompt / prompt_s, rate, bound, rate / bound,
               options.numerics), made


def _bound(model: Model, share: float, speeds: Sequence[float], options: argparse.Namespace) -> float:
    card, ram = speeds
    moe = [layer.moe.experts for layer in model.weights.layers]
    routed = sum(sum(part.nbytes for part in experts[0]) * model.config.num_experts_per_tok for experts in moe)
    dense = bytes_per_token(model, options.prompt) - routed
    if options.device == "cpu":
        return ram / (dense + routed)
    return 1 / (dense / card + max(share * routed / card, (1 - share) * routed / ram))


def _bandwidths(device: str) -> tuple[float, float]:
    """Bytes a second that a card (by copies of its own) and the CPU's kernels read."""
    ram = backends.read_bandwidth()
    if device == "cpu":
        return ram, ram
    buffer, other = (torch.empty(1 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        buffer.copy_(other)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * len(buffer) / statistics.median(times), ram


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", default="0,0.25,0.5", help="of the routed experts, to have slots for")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--numerics", default="official", choices=["official", "plain"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--most", type=float, default=1e-4, help="relative error of logits that is still the same")
    parser.add_argument("--no-whole", action="store_true", help="the model does not fit into the card")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backends.use_threads(options.threads)
    torch.set_num_threads(options.threads or 1)
    source = open_source(options.model)
    experts = source.config.num_hidden_layers * source.config.n_routed_experts
    wanted: list[int | None] = [] if options.no_whole else [None]
    wanted += [round(float(share) * experts) for share in options.shares.split(",")]
    print("| slots | hits | error | prompt tok/s | decode tok/s | bound | of the bound |\n|---|---|---|---|---|---|---|")
    rows, whole = [], None
    for slots in wanted:
        row, logits = measure(source, options.model.name, slots, options, whole)
        whole = logits.double() if whole is None else whole
        rows.append(row)
        told = "" if row.error is None else f"{row.error:.1e}"
        print(f"| {'all' if slots is None else f'{slots} of {experts}'} | {row.hits:.2f} | {told} | {row.prompt_tok_s:.1f} | "
              f"{row.decode_tok_s:.2f} | {row.bound_tok_s:.2f} | {row.of_bound:.2f} |", flush=True)
    if options.out:
        append(options.out, [field.name for field in fields(Row)], map(asdict, rows))
    return int(options.numerics == "plain" and any(row.error is not None and not row.error <= options.most for row in rows))


if __name__ == "__main__":
    sys.exit(main())
