"""Turns the C++ sources of this folder into one shared library, once per machine.

The library lies in the cache folder under a name made of everything it depends on: the sources, the compiler, its flags,
and what the processor can do. Two processes that want it at once wait for one another, and nobody ever sees half a file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4_quant.errors import QuantError

SOURCES = Path(__file__).parent
# Without contraction an expression means the same on every machine; where a fused product is wanted, `fma` says so.
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
VARIANTS = {
    "native": (NATIVE,),
    "portable": ("-DDSV4_PORTABLE",),
    "avx2": ("-march=x86-64-v3",),
    "sanitized": (NATIVE, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
COMPILERS = ("c++", "g++", "clang++")
LONGEST = 600  # seconds that one compilation may take


class BuildError(QuantError):
    """The native kernels cannot be built here; the message says why."""


def library_path(folder: Path, variant: str = "native") -> Path:
    """The compiled library in `folder`, built first if need be. Raises BuildError."""
    path = built_path(folder, variant)
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(find_compiler(), _flags(variant), path)
        except OSError as error:
            raise BuildError(f"The CPU kernels cannot be stored in {folder}: {error}.",
                             "Point DSV4_CACHE to a folder that can be written.") from error
    return path


def built_path(folder: Path, variant: str = "native") -> Path:
    """Where the library is once it is built. Raises BuildError when there is no compiler."""
    return folder / f"dsv4-{variant}-{_key(find_compiler(), _flags(variant))}.so"


def _flags(variant: str) -> tuple[str, ...]:
    return (*COMMON, *VARIANTS[variant])


def find_compiler() -> str:
    """The path of CXX, or of the first compiler of COMPILERS. Raises BuildError when there is none."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(f"There is no C++ compiler ({wanted or ', '.join(COMPILERS)}).",
                     "Install g++ or clang, or point CXX to one.")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    for fact in (compiler, *flags, platform.machine(), _version(compiler), _processor()):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:16]


def _version(compiler: str) -> str:
    """Size and time of the real compiler file: asking it for its version takes longer than everything else here."""
    stat = Path(compiler).resolve().stat()
    return f"{Path(compiler).resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _processor() -> str:
    """What -march=native looks at, where the system tells it: model and flags of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor()
    return "\n".join(line for line in first.splitlines() if line.startswith(("model", "flags", "Features", "CPU ")))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Sources side by side, as many at once as there are processors, then one link; last of all the name."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        jobs = []
        for source in sorted(SOURCES.glob("*.cpp")):
            target = Path(scratch) / f"{source.stem}.o"
            separate = [flag for flag in flags if flag != "-shared"]
            jobs.append((source.name, [compiler, *separate, "-c", str(source), "-o", str(target)], target))
        _run_all([(name, command) for name, command, _ in jobs])
        library = Path(scratch) / path.name
        _run_all([("the library", [compiler, *flags, *(str(t) for *_, t in jobs), "-o", str(library)])])
        os.replace(library, path)


def _run_all(jobs: list[tuple[str, list[str]]]) -> None:
    waiting = list(jobs)
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name, command = waiting.pop(0)
            running.append((name, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
        name, process = running.pop(0)
        try:
            said, _ = process.communicate(timeout=LONGEST)
        except BaseException:
            for _, other in [(name, process), *running]:
                other.kill()
                other.wait()
            raise
        if process.returncode:
            for _, other in running:
                other.kill()
                other.wait()
            lines = said.decode(errors="replace").strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no reason given")
            raise BuildError(f"Compiling {name} failed: {reason}",
                             "Report it with the output of `dsv4 doctor`; dsv4 works without, slowly.")
