"""Whole models on a card, for `benchmarks.gpu`: full-size Flash with random weights, `tiny` beside the CPU, and a rival."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.flash_l4 import config_of
from benchmarks.gpu_calls import Sizes
from dsv4_quant.config import ModelConfig
from dsv4_quant.recipe import named
from dsv4cli.engine.bench import Plan, bytes_per_token, measure
from dsv4cli.engine.engine import Engine
from dsv4cli.engine.sampling import Sampling
from dsv4cli.model.numerics import numerics_named
from dsv4cli.model.state import State
from dsv4cli.model.transformer import Model
from tools.random_model import RandomSource

LAYERS = 43  # of Flash
SPARE = 6 << 30  # bytes for caches and for what is computed with
# Tokens a second that are wanted of full-size Flash in q2 on an H200, and the share of the rate behind SHORT that is
# to be left behind LONG.
PROMPT_TARGET, DECODE_TARGET, SHORT, LONG, KEPT = 4000.0, 190.0, 4096, 131072, 0.8
LITTLE = {"compress_ratios": [0, 4], "num_hash_layers": 1, "hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 80,
          "num_attention_heads": 4, "qk_rope_head_dim": 16, "q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 32,
          "n_routed_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8, "vocab_size": 64, "index_n_heads": 2,
          "index_head_dim": 32, "index_topk": 1, "hc_sinkhorn_iters": 2}  # fmt: skip
QUESTIONS = ("What is 27 + 35?", "What is the capital of Japan?", "My name is Anna. What is my name?")
Row = dict[str, Any]


def flash(layers: int) -> ModelConfig:
    return ModelConfig.from_dict(config_of(layers), "Flash")


def small() -> ModelConfig:
    """A layer without compression, whose experts are looked up, and one of ratio 4, whose indexer chooses one entry."""
    return ModelConfig.from_dict({**config_of(2), **LITTLE}, "small")


def fitting(random: Generator, room: int) -> RandomSource:
    """Flash, or its first layers as many as fit into `room` bytes. Raises RuntimeError where not even three do."""
    source = RandomSource(flash(LAYERS), named("q2"), random)
    sizes = source.sizes()
    layers = next((count for count in range(LAYERS, 2, -1) if sizes[None] + sum(map(sizes.__getitem__, range(count))) < room), 0)
    if not layers:
        raise RuntimeError("not even three layers of Flash fit into the card's memory")
    return source if layers == LAYERS else RandomSource(flash(layers), named("q2"), random)


class Whole:
    """Random weights in the recipe q2, made when they are first asked for; the host reads one number a token."""

    def __init__(self, s: Sizes, device: torch.device, eager: bool) -> None:
        """eager: launches are not recorded. On the CPU, whose tensors Triton's interpreter is to take, it is a small model."""
        self.s, self.device, self.eager, self.recipe = s, device, eager, "q2" if device.type == "cuda" else "mxfp4"
        self.short: float | None = None  # tokens a second behind SHORT others, once that is known

    @cached_property
    def model(self) -> Model:
        random = Generator(self.device).manual_seed(1)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            source = fitting(random, torch.cuda.mem_get_info()[0] - SPARE)
        else:
            source = RandomSource(small(), named(self.recipe), random)
        return Model.bind(source, expand_limit=0, device=self.device.type, records=not self.eager)  # type: ignore[arg-type]

    def prompt(self) -> Iterator[Row]:
        if self.s.warm:
            self._behind(self.s.prompt)  # compiles
        _, logits, seconds = self._behind(self.s.prompt)
        yield self._row("model.prompt", logits, tokens=self.s.prompt, context=0, ms=1e3 * seconds, tok_s=self.s.prompt / seconds,
                        target=PROMPT_TARGET)

    def decode(self, context: int, bound: Callable[[float], float]) -> Iterator[Row]:
        """bound: seconds that so many bytes take at least."""
        state, logits, _ = self._behind(context)
        _, logits = self._decoded(state, logits, self.s.warm)
        seconds, logits = self._decoded(state, logits, self.s.gen)
        nbytes, rate = bytes_per_token(self.model, context), self.s.gen / seconds
        target = DECODE_TARGET if context == SHORT else KEPT * (self.short or DECODE_TARGET) if context == LONG else None
        if context == SHORT:
            self.short = rate
        if (told := trouble_of(state, self.device)) is not None and not self.eager:
            told = f"no CUDA graph: {told}"
        yield self._row("model.decode", logits, tokens=1, context=context, ms=1e3 / rate, tok_s=rate, gb_s=nbytes * rate / 1e9,
                        of_bound=bound(nbytes) * rate, target=target, trouble=None if self.eager else told)

    def chunked(self) -> Iterator[Row]:
        """The last logits of a prompt in one go and in two, neither with one token at a time: in `plain` numerics, where
        they are the same up to float32 rounding, and in `official`, where a rounded key may fall to the other side."""
        ids = self._ids(min(self.s.prompt, 700))
        sizes = [len(ids) - len(ids) // 3, len(ids) // 3]
        for name in ("plain", "official") if self.device.type == "cuda" else ("official",):
            model = Model(self.model.weights, self.model.config, numerics_named(name), records=False)
            whole, parts = (self._walked(model, ids, cut) for cut in ([len(ids)], sizes))
            yield self._row(f"model.chunked, {name}", whole, tokens=len(ids), context=0,
                            error=float((whole - parts).norm() / whole.norm()))

    def launches(self) -> Iterator[Row]:
        """Where a decoded token's time goes: the card's kernels by name, in ms of one token, `tokens` how many launches."""
        state, logits, _ = self._behind(min(SHORT, max(self.s.contexts)))
        _, logits = self._decoded(state, logits, self.s.warm)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self._decoded(state, logits, 1)
        found = sorted(profile.key_averages(), key=lambda each: -each.device_time_total)
        for each in found[:40]:
            yield {"what": "token.launches", "format": each.key[:60], "tokens": each.count, "ms": each.device_time_total / 1e3}

    def _row(self, what: str, logits: Tensor, **found: Any) -> Row:
        """Raises RuntimeError where logits are no numbers."""
        if not logits.isfinite().all():
            raise RuntimeError(f"{what}: the logits are no numbers")
        return {"what": what, "format": self.recipe, "layers": len(self.model.blocks), **found}

    def _ids(self, tokens: int) -> Tensor:
        return torch.randint(self.model.config.vocab_size, (tokens,), generator=Generator().manual_seed(tokens))

    def _state(self, model: Model, tokens: int) -> State:
        """With packed caches where numerics are official, as on every card."""
        return State(model.config, tokens, model.numerics, model.devices, packed=model.numerics.name == "official")

    def _behind(self, tokens: int) -> tuple[State, Tensor, float]:
        """A state behind so many tokens, the last one's logits, and seconds."""
        ids, state = self._ids(tokens), self._state(self.model, tokens + self.s.warm + self.s.gen + 1)
        start = self._waited()
        return state, self.model.forward(ids, state), self._waited() - start

    def _decoded(self, state: State, logits: Tensor, tokens: int) -> tuple[float, Tensor]:
        start = self._waited()
        for _ in range(tokens):
            logits = self.model.forward(logits.argmax(-1).cpu(), state)
        return self._waited() - start, logits

    def _walked(self, model: Model, ids: Tensor, sizes: list[int]) -> Tensor:
        state = self._state(model, len(ids))
        return [model.forward(part, state) for part in ids.split(sizes)][-1]

    def _waited(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def trouble_of(state: State, device: torch.device) -> str | None:
    """Why decoded tokens were not recorded."""
    return state.recording.trouble if device.type == "cuda" and state.recording is not None else None


def texts(device: str, inside: Callable[[], AbstractContextManager[None]], questions: Sequence[str], most: int) -> Iterator[Row]:
    """The embedded model's answers at temperature 0 on this device and on the CPU; error: the share of tokens that differ.

    inside: what the device's own answers are computed in."""
    for numerics in ("plain", "official"):
        differ, whole = 0, 0
        here, there = Engine.open("tiny", numerics=numerics, device=device), Engine.open("tiny", numerics=numerics, device="cpu")
        for question in questions:
            with inside():
                found = _answer(here, question, most)
            expected = _answer(there, question, most)
            differ += sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
            whole += len(expected)
        yield {"what": "tiny.text", "format": numerics, "tokens": whole, "error": differ / whole}


def _answer(engine: Engine, question: str, most: int) -> list[int]:
    tokens = engine.chat([{"role": "user", "content": question}], sampling=Sampling(temperature=0.0), max_tokens=most)
    return [token.id for token in tokens]


def rival(file: str | None, s: Sizes, device: str) -> Iterator[Row]:
    """What llama.cpp reaches on a file with all layers on the card, and what we do. Raises RuntimeError where there is none."""
    if file is None:
        raise RuntimeError("no file was named for llama.cpp to run; --gguf does")
    for row in measure(file, Plan(s.prompt, s.gen, s.contexts, 1), device=device):
        same = {"format": Path(file).name, "context": row.depth}
        yield {**same, "what": "dsv4.prompt", "tokens": row.prompt_tokens, "tok_s": row.prompt_tok_s}
        yield {**same, "what": "dsv4.decode", "tokens": 1, "tok_s": row.decode_tok_s}
    if (program := shutil.which("llama-bench")) is not None:
        yield from _by_program(program, file, s)
    elif find_spec("llama_cpp") is not None:
        yield from _by_binding(file, s)
    else:
        raise RuntimeError("there is no llama.cpp: neither llama-bench on PATH nor the package llama-cpp-python, which "
                           "CMAKE_ARGS=-DGGML_CUDA=on pip install --no-binary :all: llama-cpp-python builds for a card")


def _by_program(program: str, file: str, s: Sizes) -> Iterator[Row]:
    depths = ",".join(str(context) for context in s.contexts)
    for test in (("-p", str(s.prompt), "-n", "0"), ("-p", "0", "-n", str(s.gen), "-d", depths)):
        command = [program, "-m", file, "-ngl", "999", "-o", "json", *test]
        for row in json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout):
            decodes = bool(row["n_gen"])
            yield {"what": f"llama.cpp.{'decode' if decodes else 'prompt'}", "format": Path(file).name,
                   "tokens": 1 if decodes else row["n_prompt"], "context": row.get("n_depth", 0), "tok_s": row["avg_ts"]}


def _by_binding(file: str, s: Sizes) -> Iterator[Row]:
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        raise RuntimeError("the llama-cpp-python that is installed was built without a card's backend")
    model = llama_cpp.Llama(file, n_gpu_layers=-1, n_ctx=max(*s.contexts, s.prompt) + s.gen + 1, verbose=False)
    same = {"format": Path(file).name}

    def seconds(ids: list[int], at_once: int) -> float:
        start = time.perf_counter()
        for number in range(0, len(ids), at_once):
            model.eval(ids[number:number + at_once])
        return time.perf_counter() - start

    seconds([1000] * 16, 8)
    model.reset()
    prompt = seconds(list(range(1000, 1000 + s.prompt)), s.prompt)
    yield {**same, "what": "llama.cpp.prompt", "tokens": s.prompt, "context": 0, "tok_s": s.prompt / prompt}
    for context in s.contexts:
        model.reset()
        seconds([1000 + number % 5000 for number in range(context)], context)
        yield {**same, "what": "llama.cpp.decode", "tokens": 1, "context": context,
               "tok_s": s.gen / seconds(list(range(1000, 1000 + s.gen)), 1)}
