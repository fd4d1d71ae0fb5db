"""What doctor reports about the machine: names with values that JSON can hold; None is "not known"."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dsv4cli import __version__, paths

PACKAGES = ("torch", "triton", "numpy", "safetensors", "gguf", "tokenizers", "huggingface_hub", "typer", "rich",
            "prompt_toolkit")
TELLING_FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
                 "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "neon", "asimd", "sve", "bf16", "i8mm")
MEASURED = {"memory": "memory", "sequential": "disk, in order", "random": "disk, at random", "to_gpu": "to the gpu",
            "from_gpu": "from the gpu", "vram": "memory of the gpu"}
CGROUP_2 = ("/sys/fs/cgroup", "memory.max")
CGROUP_1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")


def versions() -> dict[str, str]:
    return {"dsv4": __version__, "python": platform.python_version(), "system": platform.platform(),
            **{name: _installed(name) for name in PACKAGES}}


def cpu() -> dict[str, Any]:
    import torch

    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": info.get("model name") or platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "cores allowed": allowed, "threads of torch": torch.get_num_threads(),
            "instructions": [flag for flag in TELLING_FLAGS if flag in flags]}


def memory() -> dict[str, Any]:
    from dsv4cli.engine.memory import address_space, available_memory, swapped_bytes

    return {"installed": {"bytes": _installed_memory()}, "in swap": {"bytes": swapped_bytes()},
            "control group's limit": {"limit": _group_limit()}, "left to map (ulimit -v)": {"limit": address_space()},
            "available to a model": {"bytes": available_memory()}}


def gpu() -> dict[str, Any]:
    """CUDA devices as torch sees them, by index."""
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "none"}
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {"cuda": torch.version.cuda,
            **{f"gpu {index}": f"{card.name}, {card.total_memory / 1e9:.1f} GB, compute {card.major}.{card.minor}"
               for index, card in enumerate(cards)}}


def card() -> str:
    """Whether a card can be used, by whom, or why not."""
    from dsv4cli.engine.device import PROVEN, card_trouble

    trouble = card_trouble()
    if trouble is not None:
        return f"no: {trouble}"
    return "yes, those that fit into its memory" + ("" if PROVEN else ", with --device cuda")


def recorded() -> dict[str, str]:
    """How a decoded token's launches reach the card; nothing where there is none that models can run on."""
    from dsv4cli.engine.device import card_trouble

    return {} if card_trouble() is not None else {"decoded tokens": tried("cuda")}


def tried(device: str) -> str:
    """What comes of recording a launch on this device."""
    import torch

    from dsv4cli.model.recording import Recording, recorder

    where = torch.device(device)
    try:
        recording, ids = Recording(where, recorder), torch.zeros(1, dtype=torch.int64, device=where)
        for position in range(2):  # the second one is recorded
            recording.run("trial", ids, position, lambda ids, position, by_host: ids + position)
    except RuntimeError as failure:  # no memory left on the card, say
        return f"nobody knows whether their launches can be recorded: {str(failure).partition(chr(10))[0]}"
    if recording.trouble is not None:
        return f"their launches are described one by one, since recording one failed: {recording.trouble}"
    return "their launches are recorded once and replayed as a graph"


def measured() -> dict[str, Any]:
    """The rates that `dsv4 doctor --measure` found, when, and on which disk and GPU."""
    from dsv4cli.engine.machine import load

    profile = load()
    if profile is None:
        return {"rates": "not measured; dsv4 doctor --measure does"}
    kernels = {f"kernels, {name}": {"kernel": rates} for name, rates in profile.kernels.items()}
    return {**{MEASURED[name]: {"bytes_s": rate} for name, rate in profile.rates().items()}, **kernels,
            "attention": {"macs_s": profile.attention}, "index scores": {"macs_s": profile.index},
            "lost in a layer": {"seconds": profile.layer_s}, "lost in a token": {"seconds": profile.token_s},
            "disk of": profile.folder, "gpu": profile.gpu or "none", "date": profile.date}


def places() -> dict[str, Any]:
    file = paths.config()
    folders = {"models": paths.models(), "cache": paths.cache(), "sessions": paths.sessions(),
               "hub cache": paths.hub_cache()}
    return {"settings": f"{file}{'' if file.exists() else '  (none)'}",
            **{name: {"path": str(folder), "free": shutil.disk_usage(_existing(folder)).free}
               for name, folder in folders.items()}}


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest above it that exists: its disk is the one that would be written to."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty on other systems."""
    lines = _text(Path("/proc/cpuinfo")).split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _installed_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _group_limit() -> int | None:
    """The smallest memory limit of the control groups around this process (version 2, then 1); None without one."""
    limits = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        number, controllers, group = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        mount, name = CGROUP_2 if number == "0" else CGROUP_1
        inner = Path(mount) / group.strip("/")
        limits += [_text(folder / name).strip() for folder in (inner, *inner.parents)]
    known = [int(limit) for limit in limits if limit.isdigit()]
    return min((limit for limit in known if limit < 1 << 60), default=None)  # version 1 writes "none" as almost 2**63


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
