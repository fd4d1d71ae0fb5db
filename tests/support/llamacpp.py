"""llama.cpp as an oracle, through the `xllamacpp` wheel: a server in this process that is asked for greedy continuations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A GGUF loaded by llama.cpp on the CPU."""

    def __init__(self, path: Path, *, context: int = 4096, threads: int = 2) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.warmup = False
        params.verbosity = 0
        params.fit_params = False
        self._server = xllamacpp.Server(params)

    def greedy(self, ids: list[int], count: int) -> str:
        """The text of at most `count` most likely tokens after the prompt `ids`."""
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": ids, "max_tokens": count, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        )
        assert "choices" in answer, answer
        return str(answer["choices"][0]["text"])
