"""The house: rooms that know only the rooms below them, a quick import, and a word on everything public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lightning_hybrid"
FILES = sorted(PACKAGE.rglob("*.py"))

# Whom each room may import besides itself. The foundation is open to all; of the others, each to those after it.
FOUNDATION = {
    "environ": set[str](),
    "errors": set[str](),
    "paths": set[str](),
    "rl": set[str](),
    "settings": {"errors"},
    "algorithms": {"rl", "errors", "settings"},
    "config": {"errors", "paths", "rl", "settings", "algorithms"},
}
STOREYS = (
    "models",
    "containers",
    "generation",
    "engines",
    "checkpoint",
    "serving",
    "rollout",
    "data",
    "export",
    "rewards",
    "strategy",
    "modules",
    "callbacks",
    "report",
    "plan",
    "assemble",
    "clusters",
)
MAY_IMPORT = FOUNDATION | {room: {*FOUNDATION, *STOREYS[:height]} for height, room in enumerate(STOREYS)}
ENTRANCE = "__init__"  # offers what all rooms hold


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each module of ours that a file imports, wherever in it, also for type checking only."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from lightning_hybrid import rl` names the room after the import.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported_rooms(file: Path) -> Iterator[tuple[int, str]]:
    for line, name in imported_modules(file):
        if name.startswith("."):
            yield line, name
        elif name.split(".")[0] == PACKAGE.name:
            yield line, [*name.split("."), ENTRANCE][1]


def test_every_room_has_its_place() -> None:
    assert {room_of(file) for file in FILES} == {*MAY_IMPORT, ENTRANCE}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {other}"
        for file in FILES
        if room_of(file) == room
        for line, other in imported_rooms(file)
        if other not in allowed
    ]
    assert wrong == []


def public_definitions(tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """Line, name and docstring of the public functions, classes and methods; not what is inside functions."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If | ast.Try | ast.With):
            waiting.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not overrides_a_described_method(node):
                yield node.lineno, node.name, ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                waiting.extend(node.body)


def overrides_a_described_method(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Whether it is marked as doing what its base class says, or sets a property that its getter describes."""
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return any(mark == "override" or mark.endswith(".setter") for mark in marks)


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        found = [(1, "the module", ast.get_docstring(tree)), *public_definitions(tree)]
        bare += [f"{file.relative_to(ROOT)}:{line} {name}" for line, name, docstring in found if not docstring]
    assert bare == []


def test_importing_the_package_loads_nothing_heavy_beside_lightning() -> None:
    # Lightning itself loads some of them: they are forgotten first, so that an import by the package shows.
    code = """
import sys, time
import lightning

def loaded():
    heavy = {"deepspeed", "transformers", "matplotlib", "datasets", "vllm", "ray"}
    return sorted(name for name in sys.modules if name.split(".")[0] in heavy)

for name in loaded():
    del sys.modules[name]
before = time.perf_counter()
import lightning_hybrid
print(f"{time.perf_counter() - before:.3f} s")
print(loaded())
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    seconds, heavy = ended.stdout.splitlines()
    print("import lightning_hybrid after lightning:", seconds)
    assert heavy == "[]"
