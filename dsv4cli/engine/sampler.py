"""From logits to a token id, on whichever device the logits are. The random numbers are the host's, and only the id is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4_kernels.sampling import BANNED, SEEN, Filters, sample
from dsv4cli.engine.sampling import Sampling
from dsv4cli.errors import Dsv4Error

Sampler = Callable[[Tensor, Sequence[int]], int]


def make_sampler(sampling: Sampling, banned: Sequence[int] = ()) -> Sampler:
    """Returns choose(logits [vocab], history of ids) -> id. `banned` ids are never chosen.

    The sampler owns its random numbers: two samplers with the same seed make the same choices, whatever else runs and wherever
    the logits are. Raises Dsv4Error for logits of which one is no number, or none that may be chosen is finite.
    """
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    filters = filters_of(sampling)
    marks: dict[tuple[torch.device, int], Tensor] = {}

    def choose(logits: Tensor, history: Sequence[int]) -> int:
        place = logits.device, len(logits)
        if place not in marks:
            marks[place] = _marked(torch.zeros(len(logits), dtype=torch.uint8), banned, BANNED).to(logits.device)
        known = marks[place]
        if filters.penalty != 1 and history:
            known = _marked(known.clone(), sorted(set(history)), SEEN)
        draw = 0 if sampling.greedy else int(torch.randint(1 << 53, (1,), generator=generator))
        token = int(sample(logits.detach().float(), known, filters, draw))
        if token < 0:
            raise Dsv4Error("The model produced logits that are not numbers.",
                            "The weights are probably damaged: compare their checksums with the published ones.")
        return token

    return choose


def filters_of(sampling: Sampling) -> Filters:
    return Filters(0.0 if sampling.greedy else sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p,
                   sampling.repetition_penalty)


def _marked(marks: Tensor, ids: Sequence[int], mark: int) -> Tensor:
    where = torch.tensor(ids, dtype=torch.int64).to(marks.device)
    marks[where] |= mark
    return marks
