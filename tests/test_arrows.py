"""Which room may import which, how long a module may be, and that every recipe parses."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from satune.config.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "satune"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400

GROUND = {"types", "task_parts", "loading", "thoughts", "ranges"}
TRAINING = GROUND | {"files", "core", "agents", "team"}
ARROWS: dict[str, set[str] | None] = {
    # room: the rooms it may import; None: all of them
    "types": set(),
    "task_parts": {"types"},
    "loading": {"types"},
    "thoughts": set(),
    "ranges": set(),
    "files": {"types"},
    "core": {"ranges"},
    "lab": {"core"},
    "agents": GROUND | {"files", "core"},
    "team": GROUND | {"files", "agents"},
    "protocols": GROUND,
    "tasks": GROUND,
    "engines": GROUND | {"files", "agents"},
    "play": GROUND | {"files"},
    "tiny": GROUND | {"files", "agents", "play"},
    "training": TRAINING,
    "swap": TRAINING | {"training", "play"},
    "report": {"types", "files", "ranges"},
    "config": TRAINING | {"engines", "report", "tiny", "training"},
    "commands": TRAINING
    | {"config", "engines", "play", "protocols", "report", "swap", "tasks", "tiny", "training"},
    "cli": None,
    "__main__": None,
}
OUTSIDE: dict[str, set[str]] = {
    # rooms that hold to few packages beside the standard library
    "types": set(),
    "task_parts": set(),
    "loading": set(),
    "thoughts": set(),
    "ranges": set(),
    "core": {"torch", "scipy"},
    "lab": {"numpy", "scipy", "torch"},
    "protocols": set(),
    "files": {"numpy", "safetensors"},
    "play": set(),
    "report": {"inspect_ai", "matplotlib", "tokenizers", "torch", "yaml"},
}


def imports(path: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Full names of the modules that the file imports anywhere; ``package`` is where it lies."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *(node.module.split(".") if node.module else ())))
            # `from . import x` may name modules, `from .x import y` names one already.
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def offences(path: Path, package: tuple[str, ...], room: str) -> list[str]:
    found = []
    for name in imports(path, package):
        top, *inner = name.split(".")
        if top == "satune":
            allowed = ARROWS[room]
            target = inner[0] if inner else ""
            if allowed is not None and target != room and target not in allowed:
                found.append(name)
        elif room in OUTSIDE and top not in sys.stdlib_module_names | OUTSIDE[room]:
            found.append(name)
    return found


def place(path: Path) -> tuple[tuple[str, ...], str]:
    """The package a module lies in, and its room."""
    parts = path.relative_to(PACKAGE).parts
    return ("satune", *parts[:-1]), parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    package, room = place(path)
    if path.name == "__init__.py":
        body = ast.parse(text).body
        docstring = body[:1] if ast.get_docstring(ast.parse(text)) is not None else []
        assert len(body) == len(docstring), "an __init__.py holds a docstring at most"
    if room != "__init__":
        assert room in ARROWS, f"the room '{room}' is not in the table"
        assert offences(path, package, room) == []


@pytest.mark.parametrize(
    ("line", "package", "room", "expected"),
    [
        ("from ..agents import learner", ("satune", "core"), "core", ["satune.agents.learner"]),
        ("from .ratios import sum_by", ("satune", "core"), "core", []),
        ("from . import ratios", ("satune", "core"), "core", []),
        ("import satune.engines.local", ("satune", "core"), "core", ["satune.engines.local"]),
        ("from satune.types import Turn", ("satune", "core"), "core", ["satune.types.Turn"]),
        ("from satune.types import Turn", ("satune", "tasks"), "tasks", []),
        ("from ..core.ratios import x", ("satune", "tasks"), "tasks", ["satune.core.ratios.x"]),
        ("from .. import play", ("satune", "training"), "training", ["satune.play"]),
        ("from .agents import x", ("satune",), "team", []),
        ("from .core import x", ("satune",), "team", ["satune.core.x"]),
        ("def f():\n    import transformers", ("satune", "core"), "core", ["transformers"]),
        ("import torch, json", ("satune", "core"), "core", []),
        ("import transformers", ("satune", "report"), "report", ["transformers"]),
        ("from ..cli import main", ("satune", "config"), "config", ["satune.cli.main"]),
    ],
)
def test_the_check_sees_every_form_of_import(
    tmp_path: Path, line: str, package: tuple[str, ...], room: str, expected: list[str]
) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)
    assert offences(path, package, room) == expected


def test_the_root_holds_no_more_than_a_glance_takes_in() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def module_of(path: Path) -> str:
    return ".".join(("satune", *path.relative_to(PACKAGE).with_suffix("").parts))


def module_graph(modules: dict[str, Path]) -> dict[str, set[str]]:
    """The modules that each module imports, wherever in it the import stands: at its head, inside a
    function or for the type checker alone."""
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = tuple(name.split(".")[:-1])
        named = set(imports(path, package))
        # `from satune.x.y import z` names a module's content, `from satune.x import y` a module.
        graph[name] = {
            m for m in modules if m in named or any(n.startswith(f"{m}.") for n in named)
        }
        graph[name].discard(name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        ahead = list(graph[start])
        while ahead:
            module = ahead.pop()
            if module not in seen:
                seen.add(module)
                ahead.extend(graph[module])
        reached[start] = seen
    groups = {
        tuple(sorted({m for m in reached[start] if start in reached[m]} | {start}))
        for start in graph
        if start in reached[start]
    }
    return [list(group) for group in sorted(groups)]


def test_no_two_modules_import_each_other() -> None:
    modules = {module_of(path): path for path in MODULES if path.name != "__init__.py"}
    assert circles(module_graph(modules)) == []


def test_the_search_for_circles_reads_type_checking_and_functions(tmp_path: Path) -> None:
    texts = {
        "satune.a": "if TYPE_CHECKING:\n    from satune.b import x",
        "satune.b": "def f():\n    from satune import c",
        "satune.c": "import satune.a",
        "satune.d": "from satune.a import y",
    }
    modules = {}
    for name, text in texts.items():
        modules[name] = tmp_path / f"{name}.py"
        modules[name].write_text(text)
    assert circles(module_graph(modules)) == [["satune.a", "satune.b", "satune.c"]]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_parse(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.team.resolved().seats
