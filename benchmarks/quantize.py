"""Every format that we write: million weights a second, and the weighted error beside llama.cpp's own quantiser.

    python benchmarks/quantize.py [FORMAT ...] [--rows 512] [--columns 4096] [--device cpu] [--llama FILE|wheel] [--out FILE.csv]

Rows are Gaussian, N(0, 0.02); columns matter by weights within 0.1..1.1. A rate is that of the fastest of `--rounds`
rounds: on one thread, and on two that each take half of the rows, as `dsv4 quantize --workers 2` does. The error is the
sum of weighted squared errors relative to that of the rows. `--llama` names a shared library that exports
`ggml_quantize_chunk` (libggml-base of a llama.cpp, or `wheel` for the one inside xllamacpp): its rate is on one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
from cpu import machine
from rows import append
from torch import Tensor

from dsv4_quant.formats import FORMATS

FIELDS = ("format", "bits", "rows", "columns", "device", "one_thread", "two_threads", "error", "llama_rate", "llama_error",
          "rate_ratio", "error_ratio", "cpu", "compiler", "torch", "xllamacpp", "commit", "date")
Quantise = Callable[[Tensor, Tensor], Tensor]


def rows_of(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Rows [n, columns] and importance [columns], the same at each call."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(options.rows, options.columns, generator=random) * 0.02
    return rows.to(options.device), (torch.rand(options.columns, generator=random) + 0.1).to(options.device)


def llama(path: str, name: str) -> Quantise:
    """The quantiser of that library for a format."""
    library = ctypes.CDLL(_wheel() if path == "wheel" else path)
    chunk = library.ggml_quantize_chunk
    chunk.restype, sizes = ctypes.c_size_t, [ctypes.c_int64] * 3
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[name.upper()]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def quantise(rows: Tensor, importance: Tensor) -> Tensor:
        stored = torch.empty(len(rows), rows.shape[1] // block * block_bytes, dtype=torch.uint8)
        chunk(int(kind), rows.data_ptr(), stored.data_ptr(), 0, *rows.shape, importance.data_ptr())
        return stored

    return quantise


def _wheel() -> str:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed.")
    return str(next(Path(spec.origin).parent.glob("xllamacpp*.so")))


def error(name: str, rows: Tensor, importance: Tensor, stored: Tensor) -> float:
    """Weighted squared error relative to the rows."""
    if FORMATS[name].block == 1 and stored.dtype == torch.uint8:
        stored = stored.view({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name])
    off = rows.double() - FORMATS[name].decode(stored, None)
    return float((off * off * importance).sum() / (rows.double() ** 2 * importance).sum())


def rate(quantise: Quantise, rows: Tensor, importance: Tensor, threads: int, rounds: int) -> float:
    """Million weights a second of the fastest round."""
    parts, best = rows.chunk(threads), float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda part: quantise(part, importance), parts))
            if rows.is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
    return rows.numel() / best / 1e6


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A line of the table."""
    rows, importance = rows_of(options)
    encode = FORMATS[name].encode
    assert encode is not None
    found: dict[str, Any] = {
        "format": name, "bits": FORMATS[name].block_bytes * 8 / FORMATS[name].block, "device": options.device,
        "rows": options.rows, "columns": options.columns,
        "error": error(name, rows, importance, encode(rows, importance)),
        "one_thread": rate(encode, rows, importance, 1, options.rounds),
        "two_threads": rate(encode, rows, importance, 2, options.rounds)}
    if options.llama:
        theirs, rows, importance = llama(options.llama, name), rows.cpu(), importance.cpu()
        found["llama_error"] = error(name, rows, importance, theirs(rows, importance))
        found["llama_rate"] = rate(theirs, rows, importance, 1, options.rounds)
        found["rate_ratio"] = found["one_thread"] / found["llama_rate"]
        if found["llama_error"]:
            found["error_ratio"] = found["error"] / found["llama_error"]
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print("| format | bits | Mweights/s: 1 thread | 2 threads | llama.cpp | ratio | error | llama.cpp | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["format"], f"{row['bits']:g}", f"{row['one_thread']:.1f}", f"{row['two_threads']:.1f}"]
        for key, form in (("llama_rate", ".1f"), ("rate_ratio", ".2f"), ("error", ".3g"), ("llama_error", ".3g"),
                          ("error_ratio", ".3f")):
            cells.append(format(row[key], form) if key in row else "")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = [name for name, fmt in FORMATS.items() if fmt.encode is not None and name != "f32"]
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"any of {', '.join(written)}; without one, all")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama", metavar="FILE", help="shared library of llama.cpp, or `wheel`")
    parser.add_argument("--out", help="CSV to append the rows to")
    options = parser.parse_args()
    unknown = sorted(set(options.formats) - set(written))
    if unknown:
        parser.error(f"nothing is written as {', '.join(unknown)}; known are {', '.join(written)}")
    torch.set_num_threads(1)  # the threads are ours
    rows = [measure(options, name) for name in options.formats or written]
    show(rows)
    if options.out:
        facts = machine()
        append(options.out, FIELDS, ({**row, **facts} for row in rows))


if __name__ == "__main__":
    main()
