"""The layout keeps its promises: no import circles, one direction between rooms, one place for each duty, one meaning for each name."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path

import pytest

import slimformer

PACKAGE = Path(slimformer.__file__).parent
# A room may import from itself and from those before it; what stands in one line may import each other, file by file.
ORDER = (
    ("errors", "rules", "digests", "files", "log", "registry", "options", "describing", "decoding"),
    ("core",),
    ("forms",),
    ("quantizing", "hooks"),
    ("families", "students"),
    ("saving",),
    ("data", "tasks"),
    ("methods",),
    ("training",),
    ("exporters", "runtimes", "kernels"),
    ("measuring",),
    ("reporting",),
    ("running",),
    ("serving", "testing", "demo"),
    ("cli", "__main__"),
)


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of the package that a module imports, anywhere in it, for types alone too."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "slimformer":
            base = node.module.removeprefix("slimformer").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in FILES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("slimformer.") for alias in node.names if alias.name.startswith("slimformer.")}
    return frozenset(found - {"", name})


def room(name: str) -> str:
    return name.partition(".")[0]


def depths(graph: Mapping[str, Set[str]]) -> dict[str, int]:
    """How many nodes stand on one another, each node counted from below; fails on a circle."""
    found: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        assert name not in above, f"a circle: {' -> '.join((*above[above.index(name) :], name))}"
        if name not in found:
            found[name] = 1 + max((depth(other, (*above, name)) for other in graph.get(name, ())), default=0)
        return found[name]

    for name in graph:
        depth(name, ())
    return found


@pytest.mark.slow
def test_no_module_imports_itself_in_a_circle() -> None:
    depths({name: imports(name) for name in FILES})


def test_no_script_of_the_results_imports_itself_in_a_circle() -> None:
    scripts = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in (PACKAGE.parents[1] / "results").glob("*.py")}
    assert scripts
    graph = {
        name: {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom) and node.module in scripts}
        | {
            alias.name
            for node in ast.walk(code)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name in scripts
        }
        for name, code in scripts.items()
    }
    depths(graph)


def test_rooms_stand_on_ten_levels_below_the_command_line() -> None:
    graph: dict[str, set[str]] = {}
    for name in FILES:
        graph.setdefault(room(name), set()).update({room(other) for other in imports(name)} - {room(name)})
    del graph["data"]  # data and tasks stand on one level: files of each read types of the other
    found = depths(
        {name: {"tasks" if other == "data" else other for other in others} - {name} for name, others in graph.items()}
    )
    assert found["running"] <= 10
    assert max(found.values()) <= 12


def test_rooms_import_in_one_direction() -> None:
    place = {name: index for index, names in enumerate(ORDER) for name in names}
    assert {room(name) for name in FILES} - {""} <= set(place), "a room without a place: add it to ORDER"
    wrong = [
        f"{name} imports {other}"
        for name in FILES
        for other in imports(name)
        if room(name) and place[room(other)] > place[room(name)]
    ]
    assert wrong == []


def test_few_files_lie_flat() -> None:
    flat = [name for name in FILES if "." not in name and FILES[name].name != "__init__.py"]
    assert len(flat) <= 15


def test_every_room_says_what_is_in_it() -> None:
    for file in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        assert text, f"{file.relative_to(PACKAGE)} says nothing"


def public_names(name: str) -> list[str]:
    names = []
    for node in tree(name).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [item for item in names if not item.startswith("_")]


def test_no_public_name_means_two_things() -> None:
    homes: dict[str, list[str]] = {}
    for name in FILES:
        for item in public_names(name):
            homes.setdefault(item, []).append(name)
    assert {item: places for item, places in homes.items() if len(places) > 1} == {}


def uses(pattern: str) -> set[str]:
    return {name for name, file in FILES.items() if re.search(pattern, file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    ("duty", "pattern", "homes"),
    [
        ("changes shapes", r"nn\.Parameter\([^)]*\[|\.index_select\(|def shrink", {"core.shrink"}),
        ("masks units", r"def gated\b", {"hooks.gating"}),
        ("steps an optimiser", r"optimizer\.step|scaler\.step|torch\.optim\.\w+\(", {"training.step"}),
        ("takes a lock", r"filelock|fcntl", {"files"}),
        ("makes a pickle", r"\bpickle\.\w|torch\.save\(", set()),
    ],
)
def test_each_duty_has_one_place(duty: str, pattern: str, homes: set[str]) -> None:
    assert uses(pattern) == homes, duty
