"""A slice of DeepSeek-V4-Flash in full width, quantised in one go and with three deaths: the same bytes, and how much memory.

    python benchmarks/flash_l4.py FOLDER [--layers 4] [--recipe mxfp4] [--workers N] [--options "--down q8_0"]

FOLDER gets a synthetic checkpoint in the official layout (random weights; four layers are 16.5 GB, one a shard) and the
outputs, and is left empty again unless --keep is given. Each conversion is `dsv4 quantize` in a process of its own, whose
peak of resident memory is read from /proc, with the mapped source counted in. The second conversion is killed three times, each
time after a quarter of the time that the unbroken one took. Exit code 1 if the SHA-256 differ or memory went over 3 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv4_quant.config import ModelConfig
from dsv4_quant.schema import TensorSpec, Variant, tensors

MOST_MEMORY = 3_000_000_000
DEATHS = 3
FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": 4096, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "sliding_window": 128, "rope_theta": 10000, "compress_rope_theta": 160000, "vocab_size": 129280, "bos_token_id": 0,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 1048576, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "eos_token_id": 1, "norm_topk_prob": True,
}  # fmt: skip


class Outcome(NamedTuple):
    """Of a conversion: seconds until it ended, peak of resident bytes, exit code."""

    seconds: float
    memory: int
    code: int


def config_of(layers: int) -> dict[str, Any]:
    ratios = [0, 0, *(4 if layer % 2 == 0 else 128 for layer in range(2, layers))]
    return {**FLASH, "num_hidden_layers": layers, "num_hash_layers": min(3, layers), "compress_ratios": ratios[:layers]}


def make(folder: Path, layers: int) -> int:
    """Writes the checkpoint, a layer a shard; returns its tensor bytes."""
    config = config_of(layers)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards: dict[int, list[TensorSpec]] = {}
    for spec in tensors(ModelConfig.from_dict(config, str(folder)), Variant()):
        shards.setdefault(-1 if spec.layer is None else spec.layer, []).append(spec)
    random, index = np.random.default_rng(4), {}
    for number, specs in enumerate(shards.values(), 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= {spec.name: name for spec in specs}
        _write_shard(folder / name, specs, random)
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return total


def _write_shard(path: Path, specs: list[TensorSpec], random: np.random.Generator) -> None:
    """Largest types first, as safetensors does it, so that every tensor lies where its numbers want to."""
    ordered = sorted(specs, key=lambda spec: -spec.nbytes // math.prod(spec.shape))
    entries, at = {}, 0
    for spec in ordered:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in ordered:
            for piece in _random(spec, random):
                file.write(piece.tobytes())


def _random(spec: TensorSpec, random: np.random.Generator) -> Iterator[np.ndarray[Any, Any]]:
    """Stored numbers in pieces: any codes (FP8's without NaN), scales near 2^-8, normally distributed floats."""
    left = math.prod(spec.shape)
    while left:
        count = min(left, 1 << 24)
        left -= count
        if spec.name.endswith("tid2eid"):
            first = random.integers(0, 256, count // 6)
            yield ((first[:, None] + 37 * np.arange(6)) % 256).astype(np.int64)  # distinct, as 37 and 256 have no common factor
        elif spec.dtype == "F8_E8M0":
            yield random.integers(117, 122, count, dtype=np.uint8)
        elif spec.dtype in ("I8", "F8_E4M3"):
            codes = random.integers(0, 256, count, dtype=np.uint8)
            yield codes & 0xFE if spec.dtype == "F8_E4M3" else codes  # 0x7F and 0xFF are NaN
        else:
            values = random.standard_normal(count, dtype=np.float32) / 64
            yield values if spec.dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)


def quantise(source: Path, output: Path, options: argparse.Namespace, seconds: float | None = None) -> Outcome:
    """Runs `dsv4 quantize`; kills it after `seconds`, if it lasts that long."""
    command = [sys.executable, "-m", "dsv4cli", "quantize", str(source), "-o", str(output), "--recipe", options.recipe,
               *shlex.split(options.options)]
    if options.workers:
        command += ["--workers", str(options.workers)]
    began, memory = time.monotonic(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        memory = max(memory, _peak(child.pid))
        if seconds is not None and time.monotonic() - began > seconds:
            child.kill()
            child.wait()
        time.sleep(0.05)
    return Outcome(time.monotonic() - began, memory, child.returncode)


def _peak(pid: int) -> int:
    """The highest resident memory of a process so far; 0 when it has just gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while piece := file.read(1 << 24):
            found.update(piece)
        return found.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recipe", default="mxfp4")
    parser.add_argument("--options", default="", help="more options of dsv4 quantize, in one word")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint and the file there")
    options = parser.parse_args()
    source, output = options.folder / "checkpoint", options.folder / "out.gguf"
    try:
        if not source.is_dir():
            print(f"checkpoint: {make(source, options.layers) / 1e9:.2f} GB", flush=True)
        return _compare(source, output, options)
    finally:
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)
            for path in options.folder.glob("out.gguf*"):
                path.unlink()


def _compare(source: Path, output: Path, options: argparse.Namespace) -> int:
    whole = quantise(source, output, options)
    if whole.code:
        return whole.code
    size, expected = output.stat().st_size, digest(output)
    print(f"unbroken: {whole.seconds:.0f} s, {size / 1e9:.2f} GB, peak {whole.memory / 1e9:.2f} GB, {expected}", flush=True)
    output.unlink()
    memory = whole.memory
    for death in range(DEATHS + 1):
        run = quantise(source, output, options, whole.seconds / (DEATHS + 1) if death < DEATHS else None)
        memory = max(memory, run.memory)
        print(f"run {death + 1}: {run.seconds:.0f} s, exit {run.code}, peak {run.memory / 1e9:.2f} GB", flush=True)
    found = digest(output)
    print(f"resumed: {found}; peak {memory / 1e9:.2f} GB", flush=True)
    return 0 if found == expected and memory < MOST_MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
