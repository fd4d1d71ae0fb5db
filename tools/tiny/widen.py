"""Carry a checkpoint over to a vocabulary with more tokens: rows are moved by the spelling of their token.

    python -m tools.tiny.widen OLD_RUN OLD_ASSET NEW_RUN NEW_ASSET

A new token starts as the token that spells the same with a space before it, or as the mean of its pieces.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.tiny.shape import VOCAB_SIZE
from tools.tiny.weights import hash_table

SPACE = "Ġ"  # how a byte-level vocabulary spells a space


def origins(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each new id the old ids whose rows it is made of."""
    found = []
    for token in range(new.get_vocab_size()):
        spelling = new.id_to_token(token) or ""
        same = [old.token_to_id(s) for s in (spelling, SPACE + spelling)]
        known = [i for i in same if i is not None][:1]
        found.append(known or old.encode(spelling, add_special_tokens=False).ids)
    return found


def widen(rows: Tensor, sources: list[list[int]]) -> Tensor:
    return torch.stack([rows[ids].float().mean(0) for ids in sources]).to(rows.dtype)


def main(old_run: Path, old_asset: Path, new_run: Path, new_asset: Path) -> None:
    old, new = (Tokenizer.from_file(str(a / "tokenizer.json")) for a in (old_asset, new_asset))
    sources = origins(old, new)
    new_run.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = torch.load(old_run / "masters.pt")
    masters = state["masters"]
    table = masters["layers.0.ffn.gate.tid2eid"]
    drawn = hash_table(VOCAB_SIZE, table.shape[1], torch.Generator().manual_seed(1))
    masters["layers.0.ffn.gate.tid2eid"] = torch.stack(
        [table[ids[0]] if len(ids) == 1 else drawn[i] for i, ids in enumerate(sources)]
    )
    before = masters["embed.weight"].shape
    for name in ("embed.weight", "head.weight"):
        masters[name] = widen(masters[name], sources)
    torch.save(state, new_run / "masters.pt")
    for path in old_run.glob("optimiser-*.pt"):
        optimiser = torch.load(path)
        for moments in optimiser["adam"]["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                if moments[key].shape == before:
                    moments[key] = widen(moments[key], sources)
        torch.save(optimiser, new_run / path.name)
    if (old_run / "log.txt").exists():
        shutil.copy(old_run / "log.txt", new_run)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
