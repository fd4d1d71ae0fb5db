"""From logits to a token id: penalty, temperature, top-k, top-p, min-p, then one draw. All in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import Dsv4Error

Sampler = Callable[[Tensor, Sequence[int]], int]


def make_sampler(sampling: Sampling, banned: Sequence[int] = ()) -> Sampler:
    """Returns choose(logits [vocab], history of ids) -> id. `banned` ids are never chosen.

    The sampler owns its random numbers: two samplers with the same seed make the same choices, whatever else runs.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    barred = torch.tensor(sorted(banned), dtype=torch.long)

    def choose(logits: Tensor, history: Sequence[int]) -> int:
        scores = penalised(_fair(logits), history, sampling.repetition_penalty)
        scores[barred] = -torch.inf
        if sampling.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(probabilities(scores, sampling), 1, generator=generator))

    return choose


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from: scores [vocab] -> probabilities [vocab], float32, zero outside what is kept.

    Each filter sees the probabilities at the chosen temperature, renormalised over what the filters before it kept.
    """
    scores = scores.float()
    chances = torch.softmax((scores - scores.max()) / sampling.temperature, -1)
    if 0 < sampling.top_k < chances.numel():
        chances = _kept(chances, chances.topk(sampling.top_k).indices)
    if sampling.top_p < 1:
        ordered, index = chances.sort(descending=True, stable=True)
        reached_before = ordered.cumsum(-1) - ordered
        chances = _kept(chances, index[reached_before < sampling.top_p])
    if sampling.min_p > 0:
        chances = _kept(chances, (chances >= sampling.min_p * chances.max()).nonzero().squeeze(-1))
    return chances


def penalised(scores: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Makes every id of the history less likely (penalty > 1): positive logits are divided, negative multiplied."""
    if penalty == 1 or not history:
        return scores
    seen = torch.tensor(sorted(set(history)), dtype=torch.long)
    old = scores[seen]
    scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
    return scores


def _kept(chances: Tensor, index: Tensor) -> Tensor:
    kept = torch.zeros_like(chances)
    kept[index] = chances[index]
    return kept / kept.sum()


def _fair(logits: Tensor) -> Tensor:
    """A float32 copy on the CPU; the caller's logits stay as they are. Refuses NaN: no choice could mean anything."""
    scores = logits.detach().to("cpu", torch.float32, copy=True)
    if torch.isnan(scores).any() or not torch.isfinite(scores).any():
        raise Dsv4Error("The model produced logits that are not numbers.",
                        "The weights are probably damaged: compare their checksums with the published ones.")
    return scores
