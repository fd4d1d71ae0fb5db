"""What `dsv4 doctor --measure` found out about a machine, kept for whoever foretells rates. Nothing here needs torch.

The file lies in the cache folder under a name of the machine's own, because home folders are shared between machines.
A profile that cannot be understood counts as none: it can be measured again.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from dsv4cli import paths
from dsv4cli.engine.atomic import whole_file


@dataclass(frozen=True)
class Profile:
    """Rates in bytes a second, None where there is nothing to measure or no way to.

    memory        all threads of our CPU kernels, reading together
    sequential    large pieces of a file in order, past the system's cache
    random        pieces of 131 KB (Linux, unless told otherwise, reads so much around a mapped page that it lacks), in no
                  order, as many at once as there are threads
    to_gpu        from pinned memory to the GPU called `gpu`; from_gpu is the way back
    folder        whose disk was read
    date          of the measurement, as YYYY-MM-DD
    vram          all of the GPU reading its memory together
    kernels       of each format that our CPU kernels read: bytes of its weights "cached" in the processor, "streamed" from
                  memory, and of "experts", six of many; one token, all threads
    attention     multiply-adds a second of one token's attention, and of an indexer's scores: `index`
    layer_s       seconds that a layer takes beside its products, and a token beside its layers: token_s

    The rates behind `date` are missing in profiles of earlier versions.
    """

    memory: float | None
    sequential: float | None
    random: float | None
    to_gpu: float | None
    from_gpu: float | None
    gpu: str | None
    folder: str
    date: str
    vram: float | None = None
    kernels: dict[str, dict[str, float]] = field(default_factory=dict)
    attention: float | None = None
    index: float | None = None
    layer_s: float | None = None
    token_s: float | None = None

    def rates(self) -> dict[str, float | None]:
        """Bytes a second, by field."""
        return {name: getattr(self, name) for name in RATES}


RATES = ("memory", "sequential", "random", "to_gpu", "from_gpu", "vram")
NUMBERS = (*RATES, "attention", "index", "layer_s", "token_s")
SPEEDS = {"cached", "streamed", "experts"}
WORDS = ("folder", "date")


def profile_path() -> Path:
    """Where this machine's profile lies, or would."""
    facts = (platform.node(), platform.machine(), os.cpu_count())
    return paths.cache() / "machines" / f"{sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def save(profile: Profile) -> Path:
    """Replaces this machine's profile and returns its path. Raises Dsv4Error where it cannot be written."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        draft.write_text(json.dumps(asdict(profile), indent=2) + "\n", encoding="utf-8")
    return path


def load() -> Profile | None:
    """This machine's profile; None when it was never measured, or what lies there is no profile."""
    try:
        said = json.loads(profile_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return Profile(**said) if _is_profile(said) else None


def _is_profile(said: Any) -> bool:
    names = [each.name for each in fields(Profile)]
    oldest = set(names[:names.index("date") + 1])
    return (isinstance(said, dict) and oldest <= said.keys() <= set(names)
            and all(said.get(name) is None or _is_rate(said[name]) for name in NUMBERS)
            and all(isinstance(said[name], str) for name in WORDS) and isinstance(said["gpu"], str | None)
            and _are_speeds(said.get("kernels", {})))


def _are_speeds(said: Any) -> bool:
    return isinstance(said, dict) and all(isinstance(each, dict) and each.keys() == SPEEDS and all(map(_is_rate, each.values()))
                                          for each in said.values())


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")
