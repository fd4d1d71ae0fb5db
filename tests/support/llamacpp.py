"""llama.cpp as an oracle, through the `xllamacpp` wheel: a server in this process that is asked for greedy continuations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xllamacpp

from dsv4cli import Engine


class LlamaCpp:
    """A GGUF loaded by llama.cpp on the CPU; with `drafter`, a file of drafting stages, and what kind they are, it speculates."""

    def __init__(self, path: Path, *, context: int = 4096, threads: int = 2, drafter: Path | None = None,
                 kind: str = "") -> None:
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
        if drafter is not None:
            params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_DRAFT_{kind}")]
            params.speculative.draft.mparams.path = str(drafter)
            params.speculative.draft.n_max = 1
        self._server = xllamacpp.Server(params)

    def greedy(self, ids: list[int], count: int) -> str:
        """The text of at most `count` most likely tokens after the prompt `ids`."""
        return str(self._answer(ids, count)["choices"][0]["text"])

    def drafted(self, ids: list[int], count: int) -> tuple[int, int]:
        """How many tokens were drafted on the way to that text, and how many of them were right."""
        timings = self._answer(ids, count)["timings"]
        return timings["draft_n"], timings["draft_n_accepted"]

    def _answer(self, ids: list[int], count: int) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": ids, "max_tokens": count, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        )
        assert "choices" in answer, answer
        return answer


def greedy(engine: Engine, ids: list[int], count: int) -> str:
    """What our own engine says: the text of at most `count` most likely tokens after the prompt `ids`."""
    session, said = engine.session(), []
    logits = session.sync(ids)
    while len(said) < count and (token := int(logits.argmax())) not in engine.tokenizer.stop_ids:
        said.append(token)
        logits = session.step(token)
    return engine.tokenizer.decode(said)
