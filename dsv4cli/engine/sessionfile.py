"""A saved session: one safetensors file with the ids, the state's tensors and the last logits.

The header says which model wrote it (a fingerprint of configuration, weights and numerics) and holds a SHA-256 of the
contents: a state is only ever continued by the model it belongs to, and never with damaged numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv4cli.engine.atomic import whole_file
from dsv4cli.errors import CorruptError, Dsv4Error, UsageError

FORMAT = "dsv4-session-1"
DAMAGED = "The file is damaged; start a new session."
STATE = "state."  # prefix of the state's tensors, so that they never clash with ids and logits


@dataclass(frozen=True)
class Saved:
    """ids [t]; logits [vocab] float32 of the last id; state: the tensors of a model Snapshot at position t."""

    ids: tuple[int, ...]
    logits: Tensor
    state: dict[str, Tensor]


def write(path: Path, saved: Saved, fingerprint: str, model: str) -> None:
    tensors = {"ids": torch.tensor(saved.ids), "logits": saved.logits}
    tensors |= {STATE + name: tensor for name, tensor in saved.state.items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # it refuses shared memory
    header = {"format": FORMAT, "fingerprint": fingerprint, "model": model, "sha256": _digest(tensors)}
    with whole_file(path) as draft:
        try:
            save_file(tensors, draft, header)
        except SafetensorError as error:
            raise Dsv4Error(f"Cannot write {path}: {error}.", "Check the folder and the free space.") from error


def read(path: Path, fingerprint: str, model: str) -> Saved:
    """Raises UsageError (no such file, another model's session) or CorruptError (damaged, or not a session at all)."""
    if not path.is_file():
        raise UsageError(f"There is no session file {path}.", "Check the path.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read as a session: {error}.", DAMAGED) from error
    if header.get("format") != FORMAT or not {"ids", "logits"} <= tensors.keys():
        raise CorruptError(f"{path} is not a session of this program ({FORMAT}).", "Choose a file that it saved.")
    if header.get("fingerprint") != fingerprint:
        raise UsageError(f"{path} was saved by {header.get('model')}, whose weights, configuration or numerics are not "
                         f"those of this {model}.", "Open what saved it (see --numerics), or start a new session.")
    if header.get("sha256") != _digest(tensors):
        raise CorruptError(f"The contents of {path} do not match their checksum.", DAMAGED)
    state = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
    return Saved(tuple(tensors["ids"].tolist()), tensors["logits"], state)


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
