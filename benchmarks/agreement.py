"""How far dsv4's fast kernels and llama.cpp are from the same weights computed in float32, on one file, side by side.

    python benchmarks/agreement.py MODEL.gguf ... [--tokens 600] [--seed 1] [--threads 2] [--oracle FILE.pt] [--out FILE.csv]

Distances are mean Kullback-Leibler divergences in nats over the next-token distributions after each of `tokens` random ids,
from the reference (every weight decoded, plain torch, float32) to the runner. Official numerics round what the caches hold, as
the released model does and llama.cpp does not; so there are two references, the released model's and one that rounds nothing,
and every runner is measured against both. What the fast products alone cost is measured as `fast products`: activations
rounded to bytes as ever, but nothing rounded in the caches, which is what llama.cpp computes too. --oracle: `{"ids",
"logits"}` that somebody else computed from the same weights (transformers, say), to be measured too. The GGUF needs a
tokenizer for llama.cpp.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rows import append
from torch import Tensor

PRODUCTS = "fast products"  # plain numerics, but for activations that are rounded where they meet packed weights
PIECE = 64  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Row:
    """Distances in nats; agreement is the share of positions where the greatest logit is the reference's."""

    file: str
    runner: str
    reference: str
    tokens: int
    mean_kl: float
    greatest_kl: float
    top1: float
    xllamacpp: str = version("xllamacpp")
    torch: str = version("torch")
    date: str = date.today().isoformat()


def dsv4(path: str, ids: Tensor, numerics: str, threads: int, *, reference: bool) -> Tensor:
    """float32 logits [tokens, vocab] of the fast kernels, or of plain torch over decoded weights."""
    from dsv4_kernels import backends
    from dsv4_quant.files import open_source
    from dsv4cli.model.numerics import NUMERICS, Numerics
    from dsv4cli.model.sizes import CACHE_BYTES
    from dsv4cli.model.transformer import Model

    NUMERICS[PRODUCTS] = Numerics(PRODUCTS, exact=False)
    CACHE_BYTES[PRODUCTS] = CACHE_BYTES["plain"]
    native = dict(backends.NATIVE)
    if reference:
        backends.NATIVE.clear()
    backends.pick.cache_clear()
    backends.use_threads(threads)
    torch.set_num_threads(threads if reference else 1)
    try:
        model = Model.bind(open_source(Path(path)), numerics=numerics, expand_limit=0)
        return model.forward(ids, model.new_state(len(ids)), logits="all").clone()
    finally:
        backends.NATIVE.update(native)
        backends.pick.cache_clear()


class _Parameters(ctypes.Structure):
    """llama.cpp's parameter structs, larger than they are: they begin with what is set here, and pass through as they came."""

    _fields_ = [("numbers", ctypes.c_uint32 * 128)]

    N_CTX, N_BATCH, N_UBATCH, N_THREADS = 0, 1, 2, slice(7, 9)  # of a context


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
                ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8))]


def llamacpp(path: str, ids: Tensor, threads: int, vocab: int) -> Tensor:
    """float32 logits [tokens, vocab] of llama.cpp, through the library inside the xllamacpp wheel."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.llama_model_default_params.restype = library.llama_context_default_params.restype = _Parameters
    library.llama_model_load_from_file.restype = library.llama_init_from_model.restype = ctypes.c_void_p
    library.llama_batch_init.restype = _Batch
    library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    wanted = library.llama_context_default_params()
    assert list(wanted.numbers[:4]) == [512, 2048, 512, 1], "llama.cpp's parameters are laid out in another way"
    assert list(wanted.numbers[_Parameters.N_THREADS]) == [4, 4], "llama.cpp's parameters are laid out in another way"
    wanted.numbers[_Parameters.N_CTX] = len(ids) + 8
    wanted.numbers[_Parameters.N_THREADS] = [threads, threads]
    context = library.llama_init_from_model(ctypes.c_void_p(model), wanted)
    assert context, f"llama.cpp does not load {path}"
    batch = library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids.tolist()):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert library.llama_decode(ctypes.c_void_p(context), batch) == 0, "llama.cpp could not compute the tokens"
    rows = (np.ctypeslib.as_array(library.llama_get_logits_ith(ctypes.c_void_p(context), i), (vocab,))
            for i in range(len(ids)))
    return torch.from_numpy(np.stack(list(rows)))


def in_a_process_of_its_own(path: str, ids: Tensor, threads: int, vocab: int) -> Tensor:
    """What `llamacpp` computes; its memory goes with the process."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(given, ids.numpy())
        subprocess.run([sys.executable, __file__, path, "--rival", str(given), str(made), "--vocab", str(vocab),
                        "--threads", str(threads)], check=True, stderr=subprocess.DEVNULL)
        return torch.from_numpy(np.load(made))


def compare(path: str, runner: str, reference: str, expected: Tensor, found: Tensor) -> Row:
    """KL(expected || found) of logits [tokens, vocab], in float64."""
    distances = []
    for a, b in zip(expected.split(PIECE), found.split(PIECE), strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (a, b))
        distances.append((p.exp() * (p - q)).sum(-1))
    kl = torch.cat(distances)
    same = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    return Row(Path(path).name, runner, reference, len(kl), float(kl.mean()), float(kl.max()), float(same))


def measure(path: str, options: argparse.Namespace) -> list[Row]:
    from dsv4_quant.files import open_source

    vocab = open_source(Path(path)).config.vocab_size
    oracle = torch.load(options.oracle) if options.oracle else None
    ids = oracle["ids"].flatten() if oracle else torch.randint(1000 % vocab, vocab, (options.tokens,),
                                                               generator=torch.Generator().manual_seed(options.seed))
    references = {name: dsv4(path, ids, name, options.threads, reference=True) for name in ("official", "plain")}
    runners = {f"dsv4, {name}": dsv4(path, ids, name, options.threads, reference=False)
               for name in ("official", PRODUCTS, "plain")}
    runners["llama.cpp"] = in_a_process_of_its_own(path, ids, options.threads, vocab)
    rows = [compare(path, runner, name, expected, found) for name, expected in references.items()
            for runner, found in runners.items()]
    rows.append(compare(path, "official reference", "plain", references["plain"], references["official"]))
    if oracle:
        theirs = oracle["logits"].reshape(-1, vocab).float()
        rows += [compare(path, runner, "oracle", theirs, runners[runner]) for runner in ("dsv4, plain", "llama.cpp")]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    for name, default in (("tokens", 600), ("threads", 2), ("seed", 1), ("vocab", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--oracle")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rival", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rival:
        given, made = options.rival
        np.save(made, llamacpp(options.models[0], torch.from_numpy(np.load(given)), options.threads, options.vocab).numpy())
        return
    rows = [row for path in options.models for row in measure(path, options)]
    print("| file | runner | against | mean KL | greatest | same top-1 |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.file} | {row.runner} | {row.reference} | {row.mean_kl:.2e} | {row.greatest_kl:.2e} | {row.top1:.1%} |")
    if options.out:
        append(options.out, [field.name for field in fields(Row)], map(asdict, rows))


if __name__ == "__main__":
    main()
