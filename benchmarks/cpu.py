"""dsv4 beside llama.cpp on one file, in turns: decode and prompt rates, and what fraction of the memory's bound they reach.

    python benchmarks/cpu.py MODEL.gguf ... [--threads 2] [--prompt 512] [--gen 64] [--depth 0] [--rounds 3] [--out FILE.csv]

Both run in processes of their own, one after the other, round by round, and the first of one round is the second of the next. A
machine that others use too gets faster and slower by half within minutes, so what is compared was measured side by side: ratios
and the fraction of the bound are medians of those of the rounds, not ratios of medians. dsv4 is measured by `dsv4 bench`;
llama.cpp through the xllamacpp wheel, by the timings of its own server. The GGUF needs a tokenizer (llama.cpp's server stops
without one); tokens are random numbers. Rates are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rows import append

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("file", "depth", "prompt", "gen", "threads", "dsv4_prompt", "rival_prompt", "prompt_ratio", "dsv4_decode",
          "rival_decode", "decode_ratio", "bytes_per_token", "bandwidth_gb_s", "bound", "fraction", "cpu", "compiler",
          "torch", "xllamacpp", "commit", "date")


def ours(options: argparse.Namespace, model: str, depth: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "dsv4cli", "bench", model, "--json", "--quiet", "--repeat", "1",
               "--threads", str(options.threads), "--prompt", str(options.prompt), "--gen", str(options.gen),
               "--depth", str(depth)]
    row: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[0]
    return row


def theirs(options: argparse.Namespace, model: str, depth: int) -> dict[str, float]:
    """Prompt and decode rates after `depth` tokens, measured in a fresh process."""
    command = [sys.executable, __file__, model, "--rival", "--threads", str(options.threads),
               "--prompt", str(options.prompt), "--gen", str(options.gen), "--depth", str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return rates


def rival(options: argparse.Namespace) -> None:
    """The other side of `theirs`: both rates behind the same context, which the server keeps from the first to the second."""
    import xllamacpp

    depth = int(options.depth)
    params = xllamacpp.CommonParams()
    params.model.path = options.models[0]
    params.n_ctx = depth + options.prompt + options.gen + 64
    params.n_parallel, params.n_gpu_layers = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.verbosity, params.fit_params = 0, False
    server = xllamacpp.Server(params)
    draw = random.Random(1)

    def drawn(tokens: int) -> list[int]:
        return [draw.randrange(1000, 100_000) for _ in range(tokens)]

    def timings(ids: list[int], gen: int) -> dict[str, float]:
        answer: dict[str, Any] = server.handle_completions({
            "prompt": ids, "max_tokens": gen, "temperature": 0.0, "top_k": 1, "cache_prompt": True, "ignore_eos": True})
        found: dict[str, float] = answer["timings"]
        return found

    timings(drawn(16), 4)
    context = drawn(max(depth, 1))
    decode = timings(context, options.gen)["predicted_per_second"]
    prompt = timings((context if depth else []) + drawn(options.prompt), 1)["prompt_per_second"]
    print(json.dumps({"prompt_tok_s": prompt, "decode_tok_s": decode}))


def compare(options: argparse.Namespace, model: str, depth: int) -> dict[str, Any]:
    mine, other = [], []
    for number in range(options.rounds):
        for side, measure in ((mine, ours), (other, theirs))[::-1 if number % 2 else 1]:
            side.append(measure(options, model, depth))

    def middle(rows: list[Any], name: str) -> float:
        return float(median(row[name] for row in rows))

    def ratio(name: str) -> float:
        return float(median(a[name] / b[name] for a, b in zip(mine, other, strict=True)))

    row = {"file": Path(model).stem, "depth": depth, "prompt": options.prompt, "gen": options.gen,
           "threads": options.threads, "dsv4_prompt": middle(mine, "prompt_tok_s"),
           "rival_prompt": middle(other, "prompt_tok_s"), "prompt_ratio": ratio("prompt_tok_s"),
           "dsv4_decode": middle(mine, "decode_tok_s"), "rival_decode": middle(other, "decode_tok_s"),
           "decode_ratio": ratio("decode_tok_s"), "bytes_per_token": mine[0]["bytes_per_token"],
           "bandwidth_gb_s": middle(mine, "bandwidth_gb_s"), "bound": middle(mine, "bound_tok_s"),
           "fraction": float(median(row["decode_tok_s"] / row["bound_tok_s"] for row in mine))}
    return {**row, **machine()}


def machine() -> dict[str, str]:
    return {"cpu": _cpu(), "compiler": _said("c++", "--version"), "torch": version("torch"),
            "xllamacpp": version("xllamacpp"), "commit": _said("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
            "date": date.today().isoformat()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def show(rows: list[dict[str, Any]]) -> None:
    print("| file | depth | prompt tok/s: dsv4 | llama.cpp | ratio | decode tok/s: dsv4 | llama.cpp | ratio | of the bound |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['file']} | {r['depth']:,} | {r['dsv4_prompt']:.1f} | {r['rival_prompt']:.1f} | {r['prompt_ratio']:.2f} | "
              f"{r['dsv4_decode']:.1f} | {r['rival_decode']:.1f} | {r['decode_ratio']:.2f} | {r['fraction']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--depth", default="0", help="tokens of context before decoding; several with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="CSV to append the rows to")
    parser.add_argument("--rival", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rival:
        rival(options)
        return
    rows = [compare(options, model, int(depth)) for model in options.models for depth in options.depth.split(",")]
    show(rows)
    if options.out:
        append(options.out, FIELDS, rows)


if __name__ == "__main__":
    main()
